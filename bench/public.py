"Audit all public submissions of a checkout of the contest, and compare with the committed table."
import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from golf_nb.audit.public import changes, confusion, git, judged, pull_folder, pull_number, write_folder
from golf_nb.files import write_atomically

TABLE = Path(__file__).parents[1]/'results'/'audit'/'public.json'
SETS = {'track_10min_16mb': 'accepted', 'track_non_record_16mb': 'no limit'}


def folders(checkout, place, known):
    "All submissions that are there: name, folder, ruling, where it was made, and a note."
    if not (checkout/'records').is_dir(): write_folder(checkout, 'HEAD', 'records', place/'main')
    records = (checkout if (checkout/'records').is_dir() else place/'main')/'records'
    for folder in sorted(path for path in records.glob('*/*') if path.is_dir()):
        new = {'ruling': SETS.get(folder.parent.name, 'none'), 'where': 'leaderboard', 'note': ''}
        yield folder.name, folder, known.get(folder.name, new)
    for name, said in known.items():
        number = pull_number(name)
        found = pull_folder(checkout, number) if number else None
        if found: yield name, write_folder(checkout, *found, place/str(number)), said


def told(one):
    "One line of the printed table."
    failing = [check for check, verdict in one['rows'].items() if verdict == 'fail']
    return f"{one['verdict']:9}  {one['ruling']:8}  {one['name'][:60]:60}  {', '.join(failing)[:70]}"


def main():
    "Audit all, print the table, and say what changed."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkout', type=Path, help="a clone of the contest's repository, bare or not")
    parser.add_argument('--table', type=Path, default=TABLE, help='the committed table; its rulings are kept')
    parser.add_argument('--write', action='store_true', help='write the verdicts into the table')
    parser.add_argument('--workers', type=int, default=2, help='processes')
    chosen = parser.parse_args()
    if not git(chosen.checkout, 'rev-parse', 'HEAD'): parser.error(f'{chosen.checkout}: no git repository')
    table = json.loads(chosen.table.read_text())
    kept = ('ruling', 'where', 'note')
    known = {one['name']: {key: one[key] for key in kept} for one in table['submissions']}
    after = []
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(chosen.workers) as pool:
        todo = list(folders(chosen.checkout, Path(temporary), known))
        results = pool.map(judged, [folder for _, folder, _ in todo])
        for (name, _, said), result in zip(todo, results, strict=True):
            after.append({'name': name, **said, **result})
            print(told(after[-1]), flush=True)
    for ruling, row in confusion(after).items():
        print(f'{ruling}: ' + ', '.join(f'{count} {verdict}' for verdict, count in row.items()))
    different = changes(table['submissions'], after)
    print('\n'.join(different) or 'as in the committed table')
    if chosen.write:
        commit = git(chosen.checkout, 'rev-parse', 'HEAD').decode().strip()
        content = {'commit': commit, 'submissions': after}
        write_atomically(chosen.table, json.dumps(content, indent=1, ensure_ascii=False).encode() + b'\n')
    return bool(different)


if __name__ == '__main__': raise SystemExit(main())
