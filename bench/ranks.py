"Time and memory of a training step with one process and with two, one thread each, on the same tokens."
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from beside import write_record

def one(name, steps, tokens):
    "Run steps of one preset in the processes started by torchrun; rank 0 prints the seconds."
    from golf_nb.data import get_dataset
    from golf_nb.model import count_parameters
    from golf_nb.optim import Clock
    from golf_nb.presets import get
    from golf_nb.step import process_group, start, train_step
    from golf_nb.trainer import prime
    config, seconds = get(name), []
    config = replace(config, steps=1000, data=replace(config.data, batch_tokens=tokens))
    late = Clock(900, steps=1000)                             # all visits, on the grid
    with process_group() as process:
        run = start(config, get_dataset(config.data.source, config.model.vocab), process)
        prime(run)
        train_step(run, late)
        for _ in range(steps):
            begin = time.perf_counter()
            train_step(run, late)
            seconds.append(time.perf_counter() - begin)
    if not process.first: return
    print(json.dumps({'preset': name, 'processes': process.world, 'seconds': seconds, 'tokens': tokens,
                      'gradient_bytes': 4*count_parameters(run.model),
                      'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024}))


def main():
    "Measure presets with one process and with two in turn; print a table."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--presets', nargs='+', default=['cycle', 'loop3'])
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--steps', type=int, default=3, help='steps per round (default: %(default)s)')
    parser.add_argument('--tokens', type=int, default=16384, help='per step, over all processes')
    parser.add_argument('--out', type=Path, help='write a record')
    parser.add_argument('--one', action='store_true', help='measure the first preset here, and print JSON')
    chosen = parser.parse_args()
    if chosen.one: return one(chosen.presets[0], chosen.steps, chosen.tokens)
    records = []
    for name in chosen.presets:
        for processes in chosen.rounds*[1, 2]:
            torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
            words = ['--one', '--presets', name, '--steps', chosen.steps, '--tokens', chosen.tokens]
            command = [sys.executable, *torchrun, __file__, *map(str, words)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                                  env=os.environ | {'OMP_NUM_THREADS': '1'})
            record = json.loads(done.stdout.splitlines()[-1])
            seconds = statistics.median(record['seconds'])
            memory = f'{record["peak_mib"]:7,.0f} MiB each'
            print(f'{name:10} {processes} process(es) {seconds:7.2f} s a step {memory}', flush=True)
            records.append(record)
    if chosen.out: write_record(chosen.out, records=records)


if __name__ == '__main__': main()
