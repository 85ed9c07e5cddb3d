"What can be said about taste, and about safety, in code."
import ast
import re

import pytest
from reading import (
    ROOT,
    cells,
    chapters,
    exported,
    functions,
    modules,
    nodes,
    notebooks,
    run,
    source,
    write_notebook,
)

VAGUE = {'utils', 'util', 'common', 'core', 'helpers', 'helper', 'misc', 'base', 'tools'}
PICKLES = {'pickle', 'cPickle', '_pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal'}
ASSERTS = re.compile(r'\b(assert|raises|expect_fail|test_\w+)\b')
WIDTH = 110


def vague_names(root):
    "Modules named after nothing."
    return [path.name for path in chapters(root) if path.stem.split('_', 1)[1] in VAGUE] + \
           [path.name for path in modules(root) if path.stem in VAGUE]


def without_docstring(root):
    "Modules that do not say what they are: the notebook lacks a `> sentence` under its title."
    return [path.name for path in modules(root) if not ast.get_docstring(ast.parse(path.read_text()))]


def never_shown(root):
    "Public functions that neither a test nor their notebook, outside of exported cells, uses by name."
    tests = ' '.join(path.read_text() for path in (root/'tests').rglob('*.py'))
    found = []
    for path in chapters(root):
        public = [name for cell in cells(path) if exported(cell) for name in functions(source(cell))]
        outside = ' '.join(source(cell) for cell in cells(path) if not exported(cell))
        shown = set(re.findall(r'\w+', outside + ' ' + tests))
        found += [f'{path.name}: {name}' for name in public if name not in shown]
    return found


def never_checked(root):
    "Chapters that export code and assert nothing about it."
    def checks(path): return any(ASSERTS.search(source(cell)) for cell in cells(path) if not exported(cell))
    return [path.name for path in chapters(root) if any(map(exported, cells(path))) and not checks(path)]


def wide_lines(root):
    "Lines of the package too wide to read; the list of names is nbdev's, and so is its width."
    found = []
    for path in modules(root):
        text = re.sub(r'^__all__ = \[.*?\]$', '', path.read_text(), flags=re.DOTALL | re.MULTILINE)
        found += [f'{path.name}: {line}' for line in text.splitlines() if len(line) > WIDTH]
    return found


def loads_safely(call):
    "Is this call free of pickle, as far as its own words say?"
    words = {word.arg: getattr(word.value, 'value', None) for word in call.keywords}
    if ast.unparse(call.func) == 'torch.load': return words.get('weights_only') is True
    return not words.get('allow_pickle', False)


def pickles(root):
    "Imports of pickle and its relatives, and loads that would run what is in the file."
    found = []
    for path in notebooks(root) + modules(root):
        names = [alias.name for node in nodes(path, ast.Import) for alias in node.names]
        # `from torch import load` counts too: it would hide the call from `loads_safely`
        names += [f'{node.module}.{name.name}' for node in nodes(path, ast.ImportFrom) for name in node.names]
        bad = [f'import {name}' for name in names if name.split('.')[0] in PICKLES or name == 'torch.load']
        bad += [ast.unparse(call) for call in nodes(path, ast.Call) if not loads_safely(call)]
        found += [f'{path.name}: {what}' for what in bad]
    return found


GUARDS = [vague_names, without_docstring, never_shown, never_checked, wide_lines, pickles]


@pytest.mark.parametrize('guard', GUARDS, ids=lambda guard: guard.__name__)
def test_the_book_has_style(guard):
    assert guard(ROOT) == []


def test_ruff_finds_nothing():
    run('ruff', 'check', '--no-cache', '--output-format=concise', 'golf_nb', 'tests', 'setup.py')


@pytest.fixture
def small_book(tmp_path):
    "A book of one chapter that breaks no rule."
    write_notebook(tmp_path/'nbs'/'00_low.ipynb', '#| default_exp low',
                   '#| export\ndef double(x): return 2*x', '#| hide\nassert double(2) == 4')
    (tmp_path/'golf_nb').mkdir()
    names = '"double", ' * 20 + '\n    "double"'
    (tmp_path/'golf_nb'/'low.py').write_text(f'"Doubling."\n__all__ = [{names}]\ndef double(x): return 2*x\n')
    return tmp_path


@pytest.mark.parametrize('guard', GUARDS, ids=lambda guard: guard.__name__)
def test_a_book_with_style_passes(guard, small_book):
    assert guard(small_book) == []


@pytest.mark.parametrize('guard, file, content', [
    (vague_names, 'nbs/01_utils.ipynb', 'x = 1'),
    (vague_names, 'golf_nb/helpers.py', '"Help."'),
    (without_docstring, 'golf_nb/low.py', 'X = 1'),
    (never_shown, 'nbs/01_high.ipynb', '#| export\ndef lonely(): return 1'),
    (never_checked, 'nbs/01_high.ipynb', '#| export\nX = 1'),
    (wide_lines, 'golf_nb/low.py', f'X = "{"x" * 110}"'),
    (pickles, 'golf_nb/low.py', 'import pickle'),
    (pickles, 'nbs/00_low.ipynb', 'def f():\n    from joblib import load\n    return load'),
    (pickles, 'golf_nb/low.py', 'from torch import load'),
    (pickles, 'golf_nb/low.py', 'import torch\nx = torch.load("x.pt")'),
    (pickles, 'golf_nb/low.py', 'import torch\nx = torch.load("x.pt", weights_only=False)'),
    (pickles, 'nbs/00_low.ipynb', 'import numpy as np\nx = np.load("x.npz", allow_pickle=True)'),
])
def test_a_planted_fault_is_found(guard, file, content, small_book):
    path = small_book/file
    if path.suffix == '.py': path.write_text(content)
    else: write_notebook(path, content)
    assert len(guard(small_book)) == 1


def test_a_wrong_shape_is_an_error(tmp_path, monkeypatch):
    "The check that pyproject.toml asks for is on in this very process, and it reads shapes."
    import numpy as np
    from jaxtyping import TypeCheckError

    import golf_nb
    (tmp_path/'golf_planted.py').write_text(
        'import numpy as np\n'
        'from jaxtyping import Float\n'
        'def total(a: Float[np.ndarray, "rows cols"], b: Float[np.ndarray, " rows"], scale: float = 1):\n'
        '    return scale * (a.sum() + b.sum())\n')
    monkeypatch.setattr(golf_nb, '__path__', [*golf_nb.__path__, str(tmp_path)])
    from golf_nb.golf_planted import total
    assert total(np.ones((2, 3)), np.ones(2), scale=2) == 16
    with pytest.raises(TypeCheckError): total(np.ones((2, 3)), np.ones(3))       # rows differ
    with pytest.raises(TypeCheckError): total(np.ones(2), np.ones(2))            # too few axes
    with pytest.raises(TypeCheckError): total(np.ones((2, 3)), np.ones(2, int))  # not floating point
