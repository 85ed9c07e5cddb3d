"All that `make bench` shows, in one table: what was measured, beside what, and what we set out to reach."
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
RECORDS = HERE.parent/'results'/'speed'
SCRIPTS = {                       # with what makes them short
    'train': ['--rounds', '2', '--steps', '2'],
    'evaluate': ['--rounds', '2', '--tokens', '16384'],
    'ttt': ['--rounds', '2', '--tokens', '8192'],
    'attention': ['--rounds', '7'],
    'files': ['--rounds', '3'],
}


def rows_of(script, record):
    "Lines of the table: what, found, goal."
    originals = json.loads((RECORDS/'originals.json').read_text())['share']
    if script == 'train':
        for one in record['records']:
            name, share = one['preset'], median(r['share'] for r in one['rounds'])
            goal = max(0.22, 2*originals[name])
            yield f'training {name}, share of the matrix rate', f'{share:.1%}', f'{goal:.1%}', share >= goal
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
    else:
        for one in record['records']:
            ours, plain = map(median, zip(*one['seconds'], strict=True))
            each = 1e6*ours/one['weights']
            yield f'{one["name"]}, s per million weights', f'{each:.3f} ({plain/ours:.2f} x)', '', None


def main():
    "Run the scripts one after the other, then print the table."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--scripts', nargs='+', default=list(SCRIPTS), choices=SCRIPTS)
    parser.add_argument('--from-records', action='store_true', help='measure nothing, show results/speed')
    parser.add_argument('--keep', action='store_true', help='write the records to results/speed')
    chosen, lines = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        for script in chosen.scripts:
            out = (RECORDS if chosen.from_records or chosen.keep else Path(folder))/f'{script}.json'
            if not chosen.from_records:
                print(f'== {script}', flush=True)
                command = [sys.executable, HERE/f'{script}.py', *SCRIPTS[script], '--out', out]
                subprocess.run(command, check=True)
            lines += rows_of(script, json.loads(out.read_text()))
    print(f'\n{"measured":58} {"found":>16} {"goal":>8}')
    for what, found, goal, reached in lines:
        verdict = '' if reached is None else 'reached' if reached else 'missed'
        print(f'{what:58} {found:>16} {goal:>8} {verdict}')


if __name__ == '__main__': main()
