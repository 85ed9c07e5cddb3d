"Train, score, adapt, and audit presets; the README table is made from the records."
import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECORDS = ROOT/'results'/'presets'
KEPT = ('report.json', 'scores.json', 'log.jsonl', 'audit.json')
# for presets that have no test-time training of their own
ADAPT = '--ttt.update sgd --ttt.lr 0.01 --ttt.chunk 4096 --ttt.batch 8 --ttt.epochs 1'.split()


def run(preset, options, folder):
    "Run all steps for one preset; keep its records if the auditor reaches a verdict."
    from golf_nb.presets import get
    own = get(preset, 'mini').ttt.update != 'off'
    words = ['--preset', preset, '--out', folder, *([] if own else ADAPT), *options]
    said = (folder.parent/f'{preset}.txt').open('wb')
    for module, arguments in (('train', words), ('audit', [folder, '--seconds', 1200])):
        command = [sys.executable, '-m', f'golf_nb.{module}', *map(str, arguments)]
        status = subprocess.run(command, stdout=said, stderr=said).returncode
        if status and module == 'train': return f'{preset}: training ended with status {status}: {said.name}'
    into = RECORDS/preset
    into.mkdir(parents=True, exist_ok=True)
    for name in KEPT: shutil.copy(folder/name, into)
    return f'{preset}: the auditor ended with status {status} (1: a check failed, 2: undecided)'


def main():
    "Run the presets in turn; two of these commands may run in parallel."
    parser = argparse.ArgumentParser(description=__doc__, epilog='Other options go to golf_nb.train.')
    every = ['tiny', 'cycle', 'hybrid', 'universal', 'replay', 'loop3']
    parser.add_argument('--presets', nargs='+', default=every)
    parser.add_argument('--threads', default='2')
    parser.add_argument('--runs', type=Path, default=ROOT/'runs'/'presets', help='where runs go')
    chosen, options = parser.parse_known_args()
    os.environ |= {'OMP_NUM_THREADS': chosen.threads, 'MKL_NUM_THREADS': chosen.threads}
    chosen.runs.mkdir(parents=True, exist_ok=True)
    for preset in chosen.presets: print(run(preset, options, chosen.runs/preset), flush=True)


if __name__ == '__main__': main()
