"Time of a training step by kind of work, from torch's profiler."
import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from beside import write_record
from torch.profiler import ProfilerActivity, profile

from golf_nb.optim import Clock
from golf_nb.presets import get
from golf_nb.runs import open_data
from golf_nb.step import Process, start, train_step
from golf_nb.trainer import prime

def kind(event):
    "Classify the self time of an event."
    name, parent = event.name, event
    while parent is not None:
        if parent.name.startswith('Optimizer.step'): return 'optimizer'
        parent = parent.cpu_parent
    if name in ('aten::mm', 'aten::addmm'): return 'products with weights'
    if name == 'aten::bmm': return 'products of attention'
    if name.startswith('golf_nb::attention'): return 'attention on tiles'
    return 'compiled elementwise work' if 'CompiledFxGraph' in name else 'the rest'


def main():
    "Print the mean seconds per step by kind."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--preset', default='cycle')
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--tokens', type=int, default=16384, help='tokens per step (default: %(default)s)')
    parser.add_argument('--label', default='now')
    parser.add_argument('--out', type=Path, help='write a record')
    chosen = parser.parse_args()
    config = get(chosen.preset)
    config = replace(config, steps=1000, data=replace(config.data, batch_tokens=chosen.tokens))
    run = start(config, open_data(config), Process())
    prime(run)
    late = Clock(900, steps=1000)                         # all visits, on the grid
    train_step(run, late)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(chosen.steps): train_step(run, late)
    spent = Counter()
    for event in seen.events(): spent[kind(event)] += event.self_cpu_time_total/1e6/chosen.steps
    for name, seconds in spent.most_common():
        print(f'{name:28} {seconds:7.3f} s {seconds/spent.total():7.1%}')
    if chosen.out:
        write_record(chosen.out, label=chosen.label, preset=chosen.preset, tokens=chosen.tokens,
                     seconds=dict(spent), threads=torch.get_num_threads())


if __name__ == '__main__': main()
