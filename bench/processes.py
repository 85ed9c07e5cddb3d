"How far do the losses of two processes drift from those of one, and of one with a weight moved by an ulp?"
import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from golf_nb.data import get_dataset
from golf_nb.presets import get
from golf_nb.trainer import Process, mean_loss, start, train_step

def losses(config, steps, nudge):
    "Train `steps` steps in this process's group; the loss of each."
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if world > 1: dist.init_process_group('gloo')
    run = start(config, get_dataset(config.data.source, config.model.vocab), Process(rank, world))
    if nudge:
        w = run.model.embed.data
        w[100, 0] = torch.nextafter(w[100, 0], torch.tensor(9.))
    found = []
    for _ in range(steps):
        train_step(run)
        found.append(mean_loss(run))
    if world > 1: dist.destroy_process_group()
    return found


def apart(count, precision, steps, nudge=False):
    "The losses of a run in `count` new processes."
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={count}']
    words = [sys.executable, *(torchrun if count > 1 else []), __file__, '--one', '--precision', precision]
    words += ['--steps', str(steps), *(['--nudge'] if nudge else [])]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    return next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('['))


def main():
    "Print the largest relative deviation of any loss, for both precisions."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--precision', default='fp32')
    parser.add_argument('--one', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--nudge', action='store_true', help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        tiny = get('tiny')
        rates = replace(tiny.optim, ns_dtype=chosen.precision)
        config = replace(tiny, precision=chosen.precision, compile=False, optim=rates)
        found = losses(config, chosen.steps, chosen.nudge)
        if int(os.environ.get('RANK', 0)) == 0: print(json.dumps(found), flush=True)
        return
    for precision in ('fp32', 'bf16'):
        one = apart(1, precision, chosen.steps)
        others = {'two processes': apart(2, precision, chosen.steps),
                  'one process, a weight moved by one ulp': apart(1, precision, chosen.steps, nudge=True)}
        for label, other in others.items():
            worst = max(abs(b/a - 1) for a, b in zip(one, other, strict=True))
            print(f'{precision}, {label:40} largest relative deviation of a loss: {worst:.1e}', flush=True)


if __name__ == '__main__': main()
