"Training throughput of the presets, each against the rate of plain matrix products, in turn."
import argparse
import json
import resource
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from beside import matrix_rate, write_record

PRESETS = 'cycle', 'hybrid', 'universal', 'replay', 'loop3'


def one(name, rounds, tokens, steps, recomputed=False):
    "Measure one preset in this process."
    import time

    import torch

    from golf_nb.data import get_dataset
    from golf_nb.model import flops_per_token, memory_bytes
    from golf_nb.optim import Clock
    from golf_nb.presets import get
    from golf_nb.step import Process, start, train_step
    from golf_nb.trainer import prime
    config = get(name)
    config = replace(config, steps=1000, recompute=recomputed, data=replace(config.data, batch_tokens=tokens))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024     # torch itself
    run = start(config, get_dataset(config.data.source, config.model.vocab), Process())
    begin = time.perf_counter()
    prime(run)
    compiled, late = time.perf_counter() - begin, Clock(900, steps=1000)   # all visits, on the grid
    train_step(run, late)
    T = config.data.seq_len
    flops, seen = flops_per_token(config.model, T), []
    for _ in range(rounds):
        rate, begin = matrix_rate(), time.perf_counter()
        for _ in range(steps): train_step(run, late)
        seconds = (time.perf_counter() - begin)/steps
        rate = (rate + matrix_rate())/2
        seen.append({'tokens_per_second': tokens/seconds, 'rate': rate, 'share': tokens*flops/seconds/rate})
    return {'preset': name, 'mflop_per_token': flops/1e6, 'seq_len': T, 'tokens': tokens,
            'compile_seconds': compiled, 'rounds': seen, 'threads': torch.get_num_threads(),
            'recomputed': recomputed, 'before_mib': before,
            'estimated_mib': memory_bytes(config.model, T, tokens//T, recomputed=recomputed)/2**20,
            'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024}


def main():
    "Measure every preset in its own process; print a table."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--presets', nargs='+', default=PRESETS)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=3, help='steps per round (default: %(default)s)')
    parser.add_argument('--tokens', type=int, default=16384, help='tokens per step (default: %(default)s)')
    parser.add_argument('--recompute', action='store_true', help='recompute activations in the backward pass')
    parser.add_argument('--out', type=Path, help='write a record')
    parser.add_argument('--one', action='store_true', help='measure the first preset here, and print JSON')
    chosen = parser.parse_args()
    if chosen.one:
        sizes = chosen.rounds, chosen.tokens, chosen.steps
        return print(json.dumps(one(chosen.presets[0], *sizes, chosen.recompute)))
    records = []
    print(f'{"preset":10} {"tokens/s":>9} {"share of the matrix rate":>25} {"compiled in":>12} {"peak":>10}')
    for name in chosen.presets:
        words = ['--one', '--presets', name, '--rounds', chosen.rounds, '--steps', chosen.steps,
                 '--tokens', chosen.tokens, *['--recompute']*chosen.recompute]
        done = subprocess.run([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True,
                              check=True)
        record = json.loads(done.stdout.splitlines()[-1])
        shares = sorted(r['share'] for r in record['rounds'])
        speed = statistics.median(r['tokens_per_second'] for r in record['rounds'])
        print(f'{name:10} {speed:9,.0f} {shares[len(shares)//2]:13.1%} ({shares[0]:.1%} .. {shares[-1]:.1%}) '
              f'{record["compile_seconds"]:9.0f} s {record["peak_mib"]:6,.0f} MiB', flush=True)
        records.append(record)
    if chosen.out: write_record(chosen.out, records=records)


if __name__ == '__main__': main()
