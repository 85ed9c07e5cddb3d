"Time and memory of a forward and backward pass by visits, width, context, vocabulary, and recomputation."
import argparse
import statistics
import time
from pathlib import Path

import torch
from beside import DTYPE, matrix_rate, write_record

from golf_nb.config import ModelConfig
from golf_nb.kernels import choose
from golf_nb.model import build, count_parameters, flops_per_token, memory_bytes
from golf_nb.schedule import from_order

BASE = dict(vocab=1024, dim=256, heads=4, kv_heads=2, hidden=768, visits=8, seq_len=256, recomputed=False)
AXES = {
    'visits': [4, 8, 16, 32],
    'dim': [128, 256, 512],
    'seq_len': [128, 256, 512, 1024],
    'vocab': [512, 1024, 4096, 16384],
    'recomputed': [False, True],
}


def kept(loss):
    "Count the bytes saved for the backward pass, each storage once, without the parameters."
    storages = {}
    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): loss()
    return sum(storages.values())


def one(point, tokens, rounds):
    "Time a forward and backward pass against the matrix rate, and count the saved bytes."
    sizes, visits, T = dict(point), point['visits'], point['seq_len']
    for name in ('visits', 'seq_len', 'recomputed'): sizes.pop(name)
    sizes['hidden'] = 3*sizes['dim']
    config = ModelConfig(schedule=from_order((visits//2)*[0, 1], unet=0), **sizes)
    model = build(config, kernels=choose(compiled=True, recomputed=point['recomputed']))
    text = torch.randint(config.vocab, (tokens//T, T + 1))
    def loss(): return model.loss(text[:, :-1], text[:, 1:], dtype=DTYPE)
    loss().backward()
    own = 2*sum(p.numel() for p in model.parameters())                        # their bf16 copies
    memory, seconds, rates = kept(loss) - own, [], []
    for _ in range(rounds):
        rates.append(matrix_rate())
        begin = time.perf_counter()
        loss().backward()
        seconds.append(time.perf_counter() - begin)
    flops = tokens*flops_per_token(config, T)
    estimate = memory_bytes(config, T, tokens//T, recomputed=point['recomputed']) - 16*count_parameters(model)
    share = statistics.median(flops/s/r for s, r in zip(seconds, rates, strict=True))
    return {'seconds': seconds, 'rates': rates, 'flops': flops, 'share': share, 'kept_bytes': memory,
            'estimated_bytes': estimate}


def main():
    "Print a table, axis by axis."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--axes', nargs='+', default=list(AXES))
    parser.add_argument('--tokens', type=int, default=4096, help='tokens per pass (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--out', type=Path, help='write a record')
    chosen = parser.parse_args()
    records = []
    for axis in chosen.axes:
        for value in AXES[axis]:
            row = one(replace_one(axis, value), chosen.tokens, chosen.rounds)
            milliseconds = 1000*statistics.median(row['seconds'])
            kept_mib, estimated = (row[key]/2**20 for key in ('kept_bytes', 'estimated_bytes'))
            print(f'{axis:10} {value!s:>6} {milliseconds:8.0f} ms {row["share"]:7.1%} '
                  f'{kept_mib:7.0f} MiB kept, {estimated:.0f} estimated', flush=True)
            records.append({'axis': axis, 'value': value, **row})
        torch.compiler.reset()
    if chosen.out:
        write_record(chosen.out, base=BASE, tokens=chosen.tokens, records=records,
                     threads=torch.get_num_threads())


def replace_one(axis, value):
    "Change one size of the base; heads keep their width."
    point = BASE | {axis: value}
    return point | {'heads': point['dim']//64, 'kv_heads': max(point['dim']//128, 1)}


if __name__ == '__main__': main()
