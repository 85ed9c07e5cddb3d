"CPU time of training steps of `cycle` mini with each kind of QAT, in turn."
import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from golf_nb.files import write_atomically
from golf_nb.presets import get
from golf_nb.report import circumstances
from golf_nb.runs import open_data
from golf_nb.step import Process, start, train_step
from golf_nb.trainer import prime

KINDS = ('none', 'ste', 'tied', 'fresh', 'ste, in every micro-batch')


def runs(mode, tokens, kinds):
    "Start one run per kind, warmed up; all have the same initial state."
    cycle = get('cycle')
    for kind in kinds:
        config = replace(cycle, steps=10_000, compile=mode == 'compiled',
                         quant=replace(cycle.quant, qat=kind.split(',')[0], min_numel=8192),
                         data=replace(cycle.data, batch_tokens=tokens, micro_batches=4))
        run = start(config, open_data(config), Process())
        prime(run)
        yield kind, run


def seconds(run, forget):
    "Time one step; `forget`: recompute rounded weights in every micro-batch."
    begin, loss = time.process_time(), run.model.loss
    def forgetful(*arguments, **options):
        if run.model.fake_quant: run.model.fake_quant.cache.clear()
        return loss(*arguments, **options)
    if forget: run.model.loss = forgetful
    train_step(run)
    if forget: del run.model.loss
    return time.process_time() - begin   # CPU time, which excludes other programs


def main():
    "Print the overhead of each kind: the median over rounds of its step time divided by that without QAT."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--tokens', type=int, default=16384, help='tokens per step (default: %(default)s)')
    parser.add_argument('--modes', nargs='+', default=['eager', 'compiled'])
    parser.add_argument('--kinds', nargs='+', default=KINDS, choices=KINDS)
    parser.add_argument('--out', type=Path, help='write the record here')
    chosen = parser.parse_args()
    found = {}
    for mode in chosen.modes:
        each = dict(runs(mode, chosen.tokens, chosen.kinds))
        for run in each.values(): train_step(run)
        times = {kind: [] for kind in chosen.kinds}
        for i in range(chosen.rounds):
            for kind in (chosen.kinds if i % 2 else chosen.kinds[::-1]):   # alternate the order
                times[kind].append(seconds(each[kind], ',' in kind))
        found[mode] = {}
        for kind in chosen.kinds:
            ratios = sorted(a/b for a, b in zip(times[kind], times['none'], strict=True))
            quarter = len(ratios)//4
            found[mode][kind] = {'ratio': statistics.median(ratios), 'low': ratios[quarter],
                                 'high': ratios[-1 - quarter], 'seconds': statistics.median(times[kind])}
            line = found[mode][kind]
            print(f'{mode:9} {kind:26} {line["seconds"]:6.3f} s a step, {100*(line["ratio"] - 1):+5.1f} % '
                  f'(quartiles {100*(line["low"] - 1):+.1f} .. {100*(line["high"] - 1):+.1f})', flush=True)
    if chosen.out:
        record = {'rounds': chosen.rounds, 'tokens': chosen.tokens, 'threads': torch.get_num_threads(),
                  'times': found, **circumstances()}
        write_atomically(chosen.out, json.dumps(record, indent=1).encode())


if __name__ == '__main__': main()
