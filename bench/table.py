"The table of `make bench`: each measurement, its baseline, and the goal."
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
RECORDS = HERE.parent/'results'/'speed'
SCRIPTS = {                       # record: script, and options for a short run
    'train': ['train', '--rounds', '2', '--steps', '2'],
    'recompute': ['train', '--rounds', '1', '--steps', '2', '--recompute', '--presets', 'cycle', 'loop3'],
    'evaluate': ['evaluate', '--rounds', '2', '--tokens', '16384'],
    'ttt': ['ttt', '--rounds', '2', '--tokens', '8192'],
    'attention': ['attention', '--rounds', '7'],
    'files': ['files', '--rounds', '3'],
    'growth': ['growth', '--rounds', '2'],
    'ranks': ['ranks', '--rounds', '1', '--presets', 'cycle'],
}


def memory_of(record):
    "Return the MiB for training each preset, without torch itself."
    return {one['preset']: one['peak_mib'] - one['before_mib'] for one in record['records']}


def shares_of(record):
    "Return the median share of the matrix rate of each preset."
    return {one['preset']: median(r['share'] for r in one['rounds']) for one in record['records']}


def speedups_of(record):
    "Return the speed-up of two processes over one, per preset."
    times = {}
    for one in record['records']:
        times.setdefault(one['preset'], {}).setdefault(one['processes'], []).extend(one['seconds'])
    return {preset: median(own[1])/median(own[2]) for preset, own in times.items()}


def rows_of(script, record):
    "Build the rows of the table: name, result, goal."
    originals = json.loads((RECORDS/'originals.json').read_text())['share']
    if script == 'train':
        for name, share in shares_of(record).items():
            goal = max(0.22, 2*originals[name])
            yield f'training {name}, share of the matrix rate', f'{share:.1%}', f'{goal:.1%}', share >= goal
    elif script == 'recompute':
        for name, mib in memory_of(record).items():
            yield f'visits computed again, {name}: MiB', f'{mib:,.0f}', '', None
    elif script == 'evaluate':
        for one in record['records']:
            share, gain = (median(r[key] for r in one['rounds']) for key in ('share', 'gain'))
            yield f'sliding {one["preset"]}, share of the matrix rate', f'{share:.1%}', '30 %', share >= 0.3
            yield f'sliding {one["preset"]}, against every position', f'{gain:.2f} x', '1.15 x', gain >= 1.15
    elif script == 'ttt':
        for one in record['records']:
            ratio = median(one['ratio'])
            what = f'test-time training {one["preset"]}, against {record["before"][:7]}'
            yield what, f'{ratio:.2f} x', '2 x', ratio >= 2
    elif script == 'attention':
        times = {name: median(map(sum, pairs)) for name, pairs in record['seconds'].items()}
        ratio = times["torch's kernel"]/times.get('tiles', times['way back written out'])
        yield "attention, against torch's kernel", f'{ratio:.2f} x', '', None
    elif script == 'growth':
        factors = [1/one['share'] for one in record['records']]
        yield 'a pass, in times of its products', f'{min(factors):.1f} .. {max(factors):.1f}', '', None
    elif script == 'ranks':
        for name, ratio in speedups_of(record).items():
            yield f'two processes, {name}, against one', f'{ratio:.2f} x', '', None
    else:
        for one in record['records']:
            ours, plain = map(median, zip(*one['seconds'], strict=True))
            each = 1e6*ours/one['weights']
            yield f'{one["name"]}, s per million weights', f'{each:.3f} ({plain/ours:.2f} x)', '', None


def main():
    "Run the scripts in turn, then print the table."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--scripts', nargs='+', default=list(SCRIPTS), choices=SCRIPTS)
    parser.add_argument('--from-records', action='store_true', help='measure nothing; show results/speed')
    parser.add_argument('--keep', action='store_true', help='write the records to results/speed')
    chosen, lines = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        for script in chosen.scripts:
            out = (RECORDS if chosen.from_records or chosen.keep else Path(folder))/f'{script}.json'
            if not chosen.from_records:
                print(f'== {script}', flush=True)
                file, *options = SCRIPTS[script]
                command = [sys.executable, HERE/f'{file}.py', *options, '--out', out]
                subprocess.run(command, check=True)
            lines += rows_of(script, json.loads(out.read_text()))
    print(f'\n{"measured":58} {"found":>16} {"goal":>8}')
    for what, found, goal, reached in lines:
        verdict = '' if reached is None else 'reached' if reached else 'missed'
        print(f'{what:58} {found:>16} {goal:>8} {verdict}')


if __name__ == '__main__': main()
