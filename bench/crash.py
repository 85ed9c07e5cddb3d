"""Kill runs at random moments, resume them until they are finished, and compare what is left.

`python bench/crash.py --runs 100 --at-once 2`: each run is a short job of the same bits. It is killed up to
`--kills` times, by SIGKILL, SIGTERM, and SIGINT in turn, sent to the whole process group as a terminal
does, each time at a moment drawn from the length of an undisturbed run; then it is resumed and left alone.
In the end all runs must have the same artifact, no half-written or temporary file, and no lock.
"""
import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from golf_nb.files import sha256
from golf_nb.report import read_log
from golf_nb.study.grid import toy_text

TRAIN = [sys.executable, '-m', 'golf_nb.train']
JOB = '''--deterministic --precision fp32 --optim.ns-dtype fp32 --no-compile --log-every 1
--checkpoint-seconds 0 --model.dim 32 --model.hidden 64 --model.vocab 400
--model.bigram.buckets 64 --quant.min-numel 500 --data.seq-len 64
--data.batch-tokens 512 --eval.window 64 --eval.stride 64'''.split()
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
LEFT = {'config.json', 'data.json', 'log.jsonl', 'checkpoint', 'model.golf', 'scores.json', 'report.json',
        'plots'}


class CrashError(Exception): "Something that must not happen."


def started(words):
    "A command in a process group of its own."
    return subprocess.Popen([str(word) for word in words], text=True, start_new_session=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def phase_of(said):
    "The phase that a log of a run ends in."
    begun = [line.split(' ', 1)[1] for line in said.splitlines() if line.endswith(' ...')]
    return begun[-1].removesuffix(' ...') if begun else 'starting'


def kill(process, after, number):
    "Send a signal after some seconds; what the process was at, None if it had ended before."
    try: said, complained = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, number)
        said, complained = process.communicate()
    else: number = 0
    if process.returncode == 0: return None                           # it was just faster
    lines = [line for line in complained.splitlines() if line.strip()]
    want = -number if number == signal.SIGKILL else 128 + number
    known = process.returncode == want or process.returncode == -number     # before anything was imported
    if not known or len(lines) > (process.returncode > 0):
        raise CrashError(f'signal {number} after {after:.2f} s: status {process.returncode}\n'
                         f'{said}\n{complained}')
    return phase_of(said)


def whole(folder, steps):
    "Check a finished folder; the hash of its artifact."
    names = {path.name for path in folder.iterdir()}
    hidden = [path.name for path in folder.rglob('.*')]
    if names != LEFT or hidden: raise CrashError(f'{folder}: left are {sorted(names ^ LEFT)}, {hidden}')
    for path in folder.glob('*.json'): json.loads(path.read_text())
    logged = [line['step'] for line in read_log(folder/'log.jsonl')]
    if logged != list(range(1, steps + 1)): raise CrashError(f'{folder}: log.jsonl has steps {logged}')
    return sha256((folder/'model.golf').read_bytes())


def survive(folder, words, steps, seconds, kills, draw):
    "One run: killed, resumed, finished; the hash of its artifact, and where it was hit."
    hit, ended = [], False
    for _ in range(kills):
        again = (folder/'config.json').exists()
        process = started([*TRAIN, '--resume', folder] if again else [*TRAIN, *words, '--out', folder])
        number = SIGNALS[(draw.number + len(hit)) % 3]
        where = kill(process, draw.uniform(0.4, seconds), number)
        ended = where is None
        if ended: break
        hit.append((number.name, where))
    if not ended:              # a report may be there, and its writer killed before it let the folder go
        again = (folder/'config.json').exists()
        process = started([*TRAIN, '--resume', folder] if again else [*TRAIN, *words, '--out', folder])
        said, complained = process.communicate()
        if process.returncode: raise CrashError(f'{folder}: could not be finished\n{said}\n{complained}')
    return whole(folder, steps), hit


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', type=int, default=100)
    parser.add_argument('--kills', type=int, default=2, help='of each run, at most')
    parser.add_argument('--steps', type=int, default=40, help='of each run; more make it longer')
    parser.add_argument('--at-once', type=int, default=2)
    parser.add_argument('--seed', type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        place, steps = Path(place), chosen.steps
        words = [*JOB, '--steps', steps, '--data.source', toy_text(place/'text')]
        begin = time.monotonic()
        said, complained = (process := started([*TRAIN, *words, '--out', place/'alone'])).communicate()
        if process.returncode: raise CrashError(f'undisturbed: {said}\n{complained}')
        seconds, alone = time.monotonic() - begin, whole(place/'alone', steps)
        print(f'undisturbed: {seconds:.0f} s, {steps} steps, {alone[:16]}', flush=True)

        def one(number):
            draw = random.Random(f'{chosen.seed} {number}')
            draw.number = number
            found = survive(place/str(number), words, steps, seconds, chosen.kills, draw)
            hits = ', '.join(f'{name} while {where}' for name, where in found[1])
            print(f'{number + 1}: {found[0][:16]} {hits}', flush=True)
            return found

        with ThreadPoolExecutor(chosen.at_once) as pool: found = list(pool.map(one, range(chosen.runs)))
    hits = [hit for _, hits in found for hit in hits]
    same = sum(result == alone for result, _ in found)
    print(f'{same} of {len(found)} runs ended with the same artifact; {len(hits)} kills; no half-written or '
          'temporary file, no lock left')
    for what, seen in zip(('signals', 'phases'), zip(*hits, strict=True), strict=False):
        print(f'{what}:', ', '.join(f'{name} {count}' for name, count in Counter(seen).most_common()))
    return int(same < len(found))


if __name__ == '__main__':
    try: sys.exit(main())
    except CrashError as error: sys.exit(f'error: {error}')
