"The notebooks run, the package matches their export, and the project files are consistent."
import filecmp
import json
import os
import re
import shlex
import shutil
import stat
import sys
from configparser import ConfigParser

import pytest
from forked import run_notebook
from reading import ROOT, cells, notebooks, run, source, write_notebook

NOTEBOOKS = notebooks(ROOT)
# A path of somebody's machine: `/work/..`, `/home/..`, `C:\Users\..`; not `example.org/home/` or `../tmp/`.
MACHINE_PATH = re.compile(r'(?<![\w.])/(work|root|home|tmp|Users|var/folders|private)/[\w.-]'
                          r'|(?<![\w.])(~/|[A-Z]:\\Users)|/\.cache/|/site-packages/')


# --- the notebooks ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, record_property, pytestconfig):
    "With `--all`, its cells marked `slow` run too."
    ran, complaint, cpu = run_notebook(notebook, ['slow'] if pytestconfig.getoption('all') else [])
    record_property('cpu', cpu)
    assert ran, complaint


def without_own_ids(root):
    "Notebooks with a cell that lacks an id or shares one: their export would differ each time."
    found = []
    for path in notebooks(root):
        ids = [cell.get('id') for cell in json.loads(path.read_text())['cells']]
        if not all(ids) or len(set(ids)) < len(ids): found.append(path.name)
    return found


def output_texts(cell):
    "All text that a cell has stored; pictures are not text."
    for output in cell.get('outputs', []):
        yield ''.join(output.get('text', ''))
        yield ''.join(output.get('traceback', []))
        for kind, text in output.get('data', {}).items():
            if kind.startswith('text/'): yield ''.join(text)


def machine_paths(root):
    "Paths of the author's machine in stored outputs."
    return [f'{path.name}: {found[0]}' for path in notebooks(root) for cell in cells(path)
            for text in output_texts(cell) if (found := MACHINE_PATH.search(text))]


def stored_errors(root):
    "Notebooks that show an error or a warning as their output."
    return [path.name for path in notebooks(root) for cell in cells(path) for output in cell['outputs']
            if output['output_type'] == 'error' or output.get('name') == 'stderr']


def not_clean(root):
    "Notebooks that `nbdev_clean` would change; it works on the copy in `root`."
    before = {path: path.read_bytes() for path in notebooks(root)}
    run('nbdev_clean', cwd=root)
    return [path.name for path, content in before.items() if path.read_bytes() != content]


def not_exported(root):
    "Modules that differ from what the notebooks export; it works on the copy in `root`."
    (root/'golf_nb').rename(root/'committed')
    (root/'golf_nb').mkdir()
    shutil.copy(root/'committed'/'__init__.py', root/'golf_nb')    # nbdev writes only the version in it
    run('nbdev_export', cwd=root)
    def files(folder): return {str(path.relative_to(folder)) for path in folder.rglob('*.py')}
    new, old = files(root/'golf_nb'), files(root/'committed')
    same = lambda name: filecmp.cmp(root/'golf_nb'/name, root/'committed'/name, shallow=False)
    return sorted(new ^ old) + sorted(name for name in new & old if not same(name))


@pytest.fixture
def book(tmp_path):
    "A copy of what nbdev reads and writes."
    unread = shutil.ignore_patterns('__pycache__', '.*', 'images')
    for name in ('nbs', 'golf_nb'): shutil.copytree(ROOT/name, tmp_path/name, ignore=unread)
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, tmp_path)
    return tmp_path


@pytest.fixture(scope='session')
def exported_book(tmp_path_factory):
    "A book of one chapter that breaks no rule."
    book = tmp_path_factory.mktemp('book')
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, book)
    write_notebook(book/'nbs'/'00_low.ipynb', '# low\n\n> Low.', '#| default_exp low', '#| export\nX = 1')
    run('nbdev_export', cwd=book)
    return book


@pytest.fixture
def small_book(exported_book, tmp_path):
    "A copy of that book, to be changed."
    return shutil.copytree(exported_book, tmp_path, dirs_exist_ok=True)


GUARDS = [without_own_ids, machine_paths, stored_errors, not_clean, not_exported]


@pytest.mark.parametrize('guard', GUARDS, ids=lambda guard: guard.__name__)
def test_the_book_is_in_order(guard, book):
    assert notebooks(book)
    assert guard(book) == []


@pytest.mark.parametrize('guard', GUARDS, ids=lambda guard: guard.__name__)
def test_a_book_in_order_passes(guard, small_book):
    assert guard(small_book) == []


def plant_twin_ids(root):
    path = root/'nbs'/'00_low.ipynb'
    path.write_text(path.read_text().replace('"cell1"', '"cell0"'))


def plant_execution_count(root):
    path = root/'nbs'/'00_low.ipynb'
    path.write_text(path.read_text().replace('"execution_count": null', '"execution_count": 7'))


def plant_stale_module(root): (root/'golf_nb'/'gone.py').write_text('X = 1\n')


def plant_stale_module_of_a_wing(root):
    (root/'golf_nb'/'wing').mkdir()
    (root/'golf_nb'/'wing'/'low.py').write_bytes((root/'golf_nb'/'low.py').read_bytes())


def plant_hand_edit(root): (root/'golf_nb'/'low.py').write_text('X = 2\n')


def plant_cell(root):
    path = root/'nbs'/'00_low.ipynb'
    path.write_text(path.read_text().replace('X = 1', 'X = 3'))


def plant(output):
    "Plant one stored output."
    return lambda root: write_notebook(root/'nbs'/'01_x.ipynb', 'x = 1', outputs=[output])


def printed(text, name='stdout'): return dict(output_type='stream', name=name, text=[text])


def shown(kind, text): return dict(output_type='display_data', data={kind: [text]}, metadata={})


@pytest.mark.parametrize('guard, fault', [
    (without_own_ids, plant_twin_ids),
    (not_clean, plant_execution_count),
    (not_exported, plant_stale_module),
    (not_exported, plant_stale_module_of_a_wing),
    (not_exported, plant_hand_edit),
    (not_exported, plant_cell),
    (machine_paths, plant(printed('saved to /work/x/y.png'))),
    (machine_paths, plant(shown('text/plain', "PosixPath('/tmp/tmpabc/a')"))),
    (machine_paths, plant(shown('text/html', '<a href="/home/me/a">'))),
    (machine_paths, plant(printed('in ~/.cache/golf_nb'))),
    (stored_errors, plant(printed('UserWarning: ..', name='stderr'))),
    (stored_errors, plant(dict(output_type='error', ename='KeyError', evalue='x', traceback=[]))),
])
def test_a_planted_fault_is_detected(guard, fault, small_book):
    fault(small_book)
    assert len(guard(small_book)) == 1


@pytest.mark.parametrize('text', ['https://example.org/home/me', 'nbs/images/a.png', '3/4', '../tmp/x'])
def test_no_machine_path(text):
    assert not MACHINE_PATH.search(text)


def test_a_failing_notebook_fails(small_book):
    def outcome(name, *sources, flags=()):
        return run_notebook(write_notebook(small_book/'nbs'/name, *sources), flags)[:2]
    ran, complaint = outcome('01_bad.ipynb', 'x = 1', 'assert x == 2')
    assert not ran and 'AssertionError' in complaint
    ran, complaint = outcome('02_ends.ipynb', 'import os; os._exit(0)')
    assert not ran and '02_ends.ipynb: its process ended' in complaint
    assert outcome('03_good.ipynb', 'x = 1', '#| slow\n1 / 0') == (True, '')
    assert not outcome('04_slow.ipynb', 'x = 1', '#| slow\n1 / 0', flags=['slow'])[0]


def test_run_stores_what_the_cells_show(small_book, monkeypatch, capfd):
    from golf_nb.authoring.book import run_in_processes
    good = write_notebook(small_book/'nbs'/'01_good.ipynb', '6 * 7', '#| slow\n1 / 0')
    bad = write_notebook(small_book/'nbs'/'02_bad.ipynb', '1 / 0')
    before = bad.read_bytes()
    monkeypatch.chdir(ROOT)
    assert run_in_processes([good, bad], [], 2) == 1
    assert [''.join(output['data']['text/plain']) for output in cells(good)[0]['outputs']] == ['42']
    assert bad.read_bytes() == before
    assert '02_bad.ipynb: cell 1 (cell0) raised ZeroDivisionError: division by zero' in capfd.readouterr().err
    assert run_in_processes([good], ['slow'], 1) == 1


def test_book_outside_a_project_is_refused_in_one_line(tmp_path):
    out = run(sys.executable, '-P', '-m', 'golf_nb.authoring.book', 'readme', cwd=tmp_path, code=1)
    assert len(out.splitlines()) == 1 and 'no settings.ini here' in out


# --- the README ------------------------------------------------------------------------------------------

def test_readme_is_what_the_index_says(monkeypatch):
    from golf_nb.authoring.book import readme
    monkeypatch.chdir(ROOT)
    assert [path.name for path in readme(check=True)] == [], 'run: make readme'


def test_a_readme_edited_by_hand_is_detected(small_book):
    "In its own process, because nbdev caches the first settings.ini it reads."
    write_notebook(small_book/'nbs'/'index.ipynb', '# low\n\n> Low.', '1 + 1')
    # -P: not the golf_nb of the small book
    command = [sys.executable, '-P', '-m', 'golf_nb.authoring.book', 'readme']
    assert 'wrote README.md' in run(*command, cwd=small_book)
    assert run(*command, '--check', cwd=small_book) == ''
    with open(small_book/'README.md', 'a') as file: file.write('By hand.\n')
    assert 'stale README.md' in run(*command, '--check', cwd=small_book, code=1)


def readme_blocks():
    "The README, and the text of its code blocks."
    text = (ROOT/'README.md').read_text()
    return text, '\n'.join(re.findall(r'^```\w*\n(.*?)^```', text, re.DOTALL | re.MULTILINE))


def test_readme_names_the_commands_that_exist():
    text, blocks = readme_blocks()
    in_blocks = re.findall(r'^\$?\s*make ([\w-]+)', blocks, re.MULTILINE)
    used = {*re.findall(r'`make ([\w-]+)', text), *in_blocks}
    assert {'run', 'test'} <= used <= set(make_targets())


def test_readme_links_lead_somewhere():
    text, blocks = readme_blocks()
    links = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'\b(?:src|href)="([^"]+)"', text)
    local = {link.split('#')[0] for link in links if not re.match(r'[a-z]+:|#', link)}
    assert [link for link in sorted(local) if not (ROOT/link).exists()] == []


# --- make, CI and the pins -------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which('make') is None, reason='make is not installed')


def make_targets():
    "The commands of the Makefile."
    return re.findall(r'^([a-z-]+):', (ROOT/'Makefile').read_text(), re.MULTILINE)


@needs_make
def test_make_alone_lists_every_command():
    shown = re.findall(r'^  make ([\w-]+)', run('make', '--no-print-directory'), re.MULTILINE)
    assert sorted(shown) == sorted(make_targets())


@needs_make
def test_make_runs_train_and_pytest():
    assert '-m golf_nb.train --steps 3' in run('make', '--dry-run', 'run', 'ARGS=--steps 3')
    some, every = (run('make', '--dry-run', name, 'ARGS=-k x') for name in ('test', 'test-all'))
    assert '-m pytest' in some and '-k x' in some and '--all' not in some
    assert every == some.replace('-m pytest', '-m pytest --all')


@needs_make
def test_an_old_python_is_refused_in_one_line(tmp_path):
    old = tmp_path/'old-python'
    code = 'import sys; sys.version_info = (3, 10, 0); exec(sys.argv[2])'
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    old.chmod(0o755)
    for python, word in ((old, 'is 3.10'), (tmp_path/'none', 'there is no')):
        lines = run('make', f'PYTHON={python}', f'VENV={tmp_path}/venv', 'test', code=2).strip().splitlines()
        messages = [line for line in lines if not line.startswith('make')]
        assert len(messages) == 1 and 'needs Python 3.11 or newer' in messages[0] and word in messages[0]


def test_ci_runs_make_test():
    script = ROOT/'.ci'/'run'
    assert script.stat().st_mode & stat.S_IXUSR
    assert script.read_text().splitlines()[-1] == 'exec make test'


def test_pins_agree():
    "requirements.txt and settings.ini name the same releases, each exactly."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    facts = ini['DEFAULT']
    wanted = shlex.split(facts['requirements']) + shlex.split(facts['dev_requirements'])
    lines = [line.split('#')[0].strip() for line in (ROOT/'requirements.txt').read_text().splitlines()]
    assert sorted(filter(None, lines)) == sorted(wanted)
    assert [name for name in wanted if not re.fullmatch(r'[\w.-]+==[\w.]+', name)] == []


@pytest.mark.skipif('CI' not in os.environ, reason='an author may try other releases')
def test_ci_runs_with_the_pinned_releases():
    import importlib.metadata
    lines = (ROOT/'requirements.txt').read_text().splitlines()
    pins = dict(line.split('==') for line in lines if '==' in line)
    installed = {name: importlib.metadata.version(name).split('+')[0] for name in pins}
    assert installed == pins


def test_nothing_is_left_to_the_notebook_metadata():
    "Every notebook asks for the same kernel, so it opens on any machine."
    for path in NOTEBOOKS:
        assert json.loads(path.read_text())['metadata']['kernelspec']['name'] == 'python3', path.name
        assert not any('/content/' in source(cell) for cell in cells(path)), path.name
