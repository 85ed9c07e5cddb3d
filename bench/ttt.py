"Score-first test-time training end to end: this commit against an earlier one, in turn."
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from beside import DTYPE, write_record

HERE = Path(__file__).parents[1]
BEFORE = '0e74e81500bf97c767e0c5f6499b158f41c3b889'   # the last commit before any optimization
ONCE = '''
import json, sys, time
import torch
from dataclasses import replace
from golf_nb.config import TTTConfig
from golf_nb.data import get_dataset
from golf_nb.model import build
from golf_nb.presets import get
from golf_nb.ttt import score_first
name, tokens, rounds, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
config = get(name)
data = get_dataset(config.data.source, config.model.vocab)
stream, model = data.val_tokens()[:tokens + 1], build(config.model).eval()
try:
    from golf_nb.kernels import choose
    model = model.with_kernels(choose(compiled=True))
except ImportError: pass                                      # the code before
chosen = TTTConfig(update='sgd', lr=0.002, chunk=8192)
for once in range(rounds + 1):                                # the first round compiles
    begin = time.perf_counter()
    run = score_first(model, stream, 512, 64, chosen, bytes=data.byte_table, batch=8, dtype=dtype,
                      bos=data.tokenizer.bos)
    print(json.dumps({'seconds': time.perf_counter() - begin, 'bpb': run.bpb}), flush=True)
    if sys.stdin.readline() == '': break                      # its turn again
'''


def turns(trees, preset, tokens, rounds):
    "Alternate between one process per tree; the first turn of each is not counted."
    def begin(tree):
        return subprocess.Popen([sys.executable, '-c', ONCE, preset, str(tokens), str(rounds),
                                 str(DTYPE).removeprefix('torch.')],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
                                env={**os.environ, 'PYTHONPATH': str(tree)})
    rows, processes = {name: [] for name in trees}, {}
    for turn in range(rounds + 1):
        for name, tree in trees.items():
            if turn: processes[name].stdin.write('go\n'), processes[name].stdin.flush()
            else: processes[name] = begin(tree)
            row = json.loads(processes[name].stdout.readline())
            if turn: rows[name].append(row)
    for process in processes.values(): process.kill()
    return rows


def main():
    "Print seconds, their ratio, and both scores."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--presets', nargs='+', default=['cycle'])
    parser.add_argument('--tokens', type=int, default=16384)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--out', type=Path, help='write a record')
    chosen = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as old:
        subprocess.run(['git', '-C', HERE, 'worktree', 'add', '--quiet', '--detach', old, BEFORE], check=True)
        try:
            for preset in chosen.presets:
                rows = turns({'before': old, 'now': HERE}, preset, chosen.tokens, chosen.rounds)
                ratio = [a['seconds']/b['seconds'] for a, b in zip(rows['before'], rows['now'], strict=True)]
                print(f'{preset}: {chosen.tokens:,} tokens, window 512, stride 64, 3 epochs of SGD: '
                      f'{statistics.median(ratio):.2f} times as fast ({min(ratio):.2f} .. {max(ratio):.2f}); '
                      f'bpb {rows["before"][0]["bpb"]:.6f} before, {rows["now"][0]["bpb"]:.6f} now',
                      flush=True)
                records.append({'preset': preset, 'tokens': chosen.tokens, 'ratio': ratio, **rows})
        finally: subprocess.run(['git', '-C', HERE, 'worktree', 'remove', '--force', old], check=True)
    if chosen.out: write_record(chosen.out, before=BEFORE, records=records)


if __name__ == '__main__': main()
