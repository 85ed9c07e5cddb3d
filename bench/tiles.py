"A bf16 training step and scoring, compiled, with the CPU tiles and without: two processes in turn."
import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from beside import write_record

WHAT = 'train', 'score'


def worker(name, tiles, tokens):
    "Take a training step or score a batch for each line of the input; print its seconds."
    import golf_nb.kernels
    from golf_nb.data import get_dataset
    from golf_nb.kernels.tiles import load_tiles
    from golf_nb.optim import Clock
    from golf_nb.presets import get
    from golf_nb.step import Process, start, train_step
    from golf_nb.trainer import prime
    torch.set_num_threads(1)
    if not tiles: golf_nb.kernels.load_tiles = lambda: False
    elif not load_tiles(): sys.exit('this machine has no tiles')
    config = get(name, 'mini')
    config = replace(config, steps=1000, precision='bf16', compile=True,
                     data=replace(config.data, batch_tokens=tokens, micro_batches=1))
    run = start(config, get_dataset(config.data.source, config.model.vocab), Process())
    late = Clock(900, steps=1000)                         # all visits, on the grid
    rows = torch.randint(config.model.vocab, (tokens//config.eval.window, config.eval.window + 1))
    def score():
        run.model.eval()
        with torch.no_grad():
            run.model.token_nats(rows[:, :-1], rows[:, 1:], config.eval.window//2, dtype=torch.bfloat16)
        run.model.train()
    prime(run), train_step(run, late), score()
    print('ready', flush=True)
    for line in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        train_step(run, late) if line.strip() == 'train' else score()
        print(json.dumps({'wall': time.perf_counter() - begin, 'cpu': time.process_time() - cpu}), flush=True)


def one(name, tokens, pairs):
    "Measure one preset: seconds of each pair."
    def begin(kind):
        words = [sys.executable, __file__, '--worker', kind, '--presets', name, '--tokens', str(tokens)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if process.stdout.readline() != 'ready\n': sys.exit(f'{name}: no worker {kind} tiles')
        return process
    workers = {kind: begin(kind) for kind in ('with', 'without')}
    def ask(kind, what):
        workers[kind].stdin.write(what + '\n'), workers[kind].stdin.flush()
        return json.loads(workers[kind].stdout.readline())
    found = {what: [] for what in WHAT}
    for i in range(pairs):
        order = list(workers)[::1 if i % 2 else -1]
        for what in WHAT: found[what].append({kind: ask(kind, what) for kind in order})
    for process in workers.values(): process.communicate()
    return {'preset': name, 'tokens': tokens, **found}


def ratio(pairs, clock='cpu'):
    "Median of the time without tiles over the time with them."
    return median(pair['without'][clock]/pair['with'][clock] for pair in pairs)


def main():
    "Print the ratios."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--presets', nargs='+', default=['tiny', 'cycle', 'loop3'])
    parser.add_argument('--tokens', type=int, default=8192, help='of a step')
    parser.add_argument('--pairs', type=int, default=15)
    parser.add_argument('--worker', choices=['with', 'without'], help=argparse.SUPPRESS)
    parser.add_argument('--out', type=Path, help='write a record')
    chosen = parser.parse_args()
    if chosen.worker: return worker(chosen.presets[0], chosen.worker == 'with', chosen.tokens)
    records = []
    for name in chosen.presets:
        records.append(one(name, chosen.tokens, chosen.pairs))
        print(name, {what: round(ratio(records[-1][what]), 2) for what in WHAT}, flush=True)
    if chosen.out: write_record(chosen.out, threads=1, records=records)


if __name__ == '__main__': main()
