"Sliding evaluation: the last visit only at scored positions, against all positions, in turn."
import argparse
import statistics
import time
from pathlib import Path

import torch
from beside import DTYPE, matrix_rate, write_record

from golf_nb.evaluate import sliding
from golf_nb.kernels import choose
from golf_nb.model import build, flops_per_token
from golf_nb.presets import get
from golf_nb.runs import open_data

PRESETS = 'cycle', 'hybrid', 'universal', 'replay', 'loop3'
WINDOW, STRIDE, BATCH = 512, 64, 32


class Plain(torch.nn.Module):
    "The same forward pass on the same batches, with every position computed."
    def __init__(self, model):
        super().__init__()
        self.model, self.cast_weights = model, model.cast_weights

    def token_nats(self, tokens, targets, last_n=None, **options):
        nats = self.model.token_nats(tokens, targets, **options)
        return nats if last_n is None else nats[:, -last_n:]


def one(name, tokens, rounds, compiled):
    "Measure one preset with untrained weights: their values do not affect the time."
    config = get(name)
    model = build(config.model, kernels=choose()).eval().requires_grad_(False)
    data = open_data(config)
    stream = data.val_tokens()[:tokens + 1]
    few, exact = stream[:WINDOW + BATCH*STRIDE + 1], dict(bytes=data.byte_table, batch=BATCH)
    a, b = (sliding(m, few, WINDOW, STRIDE, **exact).nll for m in (model, Plain(model)))   # in fp32
    if compiled: model = model.with_kernels(choose(compiled=True))
    options = exact | {'dtype': DTYPE}
    for m in (model, Plain(model)): sliding(m, few, WINDOW, STRIDE, **options)   # compiles
    flops = flops_per_token(config.model, WINDOW)/3*WINDOW/STRIDE   # of a scored token
    seen = []
    for _ in range(rounds):
        row = {'rate': matrix_rate()}
        for key, m in (('fast', model), ('plain', Plain(model))):
            begin = time.perf_counter()
            sliding(m, stream, WINDOW, STRIDE, **options)
            row[key] = tokens/(time.perf_counter() - begin)   # tokens/s
        seen.append(row | {'share': row['fast']*flops/row['rate'], 'gain': row['fast']/row['plain']})
    return {'preset': name, 'compiled': compiled, 'tokens': tokens, 'rounds': seen,
            'largest_difference': float(abs(a - b).max()), 'threads': torch.get_num_threads()}


def main():
    "Print a table."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--presets', nargs='+', default=PRESETS)
    parser.add_argument('--tokens', type=int, default=8192, help='scored per round (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--eager', action='store_true', help='do not compile')
    parser.add_argument('--out', type=Path, help='write a record')
    chosen = parser.parse_args()
    print(f'{"preset":10} {"scored tokens/s":>15} {"share of the matrix rate":>25} {"against plain":>14} '
          f'{"nll differ by":>14}')
    records = []
    for name in chosen.presets:
        record = one(name, chosen.tokens, chosen.rounds, not chosen.eager)
        rounds, keys = record['rounds'], ('fast', 'share', 'gain')
        middle = {key: statistics.median(row[key] for row in rounds) for key in keys}
        print(f'{name:10} {middle["fast"]:15,.0f} {middle["share"]:25.1%} {middle["gain"]:14.2f} '
              f'{record["largest_difference"]:14.1e}', flush=True)
        records.append(record)
        torch.compiler.reset()
    if chosen.out: write_record(chosen.out, records=records)


if __name__ == '__main__': main()
