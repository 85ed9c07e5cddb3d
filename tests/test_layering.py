"The number of a notebook is its layer: imports point down, and every name says where it is from."
import ast
import re

import pytest
from reading import ROOT, cells, chapters, core, exported, modules, nodes, notebooks, source, write_notebook

def layers(root):
    "Module name -> number of its notebook; the wing `kernels` is below the one module that chooses from it."
    return {path.stem.split('_', 1)[1]: path.stem.split('_')[0] for path in core(root)} | {'kernels': '12~'}


def targets(path):
    "The modules of golf_nb that a notebook or module imports, wherever in it."
    found = []
    for node in nodes(path, ast.Import):
        found += [name.name.split('.')[1] for name in node.names if name.name.startswith('golf_nb.')]
    for node in nodes(path, ast.ImportFrom):
        name = f'golf_nb.{node.module or ""}'.strip('.') if node.level else node.module
        if name == 'golf_nb': found += [alias.name for alias in node.names]
        elif name.startswith('golf_nb.'): found.append(name.split('.')[1])
    return found


def upward_imports(root):
    "Imports of a module that is not below the importer, in notebooks and in the package."
    number = layers(root)
    importers = [(path, number[path.stem.split('_', 1)[1]]) for path in core(root)]
    importers += [(path, number.get(path.stem, '')) for path in modules(root)
                  if path.parent == root/'golf_nb']
    return [f'{path.name} imports {target}, which is not below it' for path, layer in importers
            for target in targets(path) if number.get(target, '~') >= layer]


def star_imports(root):
    "`from x import *`, which hides where a name is from."
    return [f'{path.name}: from {node.module} import *' for path in notebooks(root) + modules(root)
            for node in nodes(path, ast.ImportFrom) if node.names[0].name == '*']


def misnamed(root):
    "Notebooks whose file name does not end in the module they export, and numbers that are used twice."
    found, used = [], {}
    for path in chapters(root):
        default = re.search(r'#\|\s*default_exp\s+(\S+)', '\n'.join(source(cell) for cell in cells(path)))
        name, wing = default and default[1], '' if path.parent == root/'nbs' else f'{path.parent.name}.'
        if name not in (wing + path.stem.split('_', 1)[1], f'{wing}__init__'):
            found.append(f'{path.name} exports {name}')
        number = wing + path.stem.split('_')[0]
        if number in used: found.append(f'{path.name} has the number of {used[number]}')
        used[number] = path.name
    return found


def exporting_outsiders(root):
    "Notebooks that export although they are no chapter: the index and the experiments."
    outsiders = [path for path in notebooks(root) if path not in chapters(root)]
    return [path.name for path in outsiders for cell in cells(path)
            if exported(cell) or re.search(r'#\|\s*default_exp', source(cell))]


GUARDS = [upward_imports, star_imports, misnamed, exporting_outsiders]


@pytest.mark.parametrize('guard', GUARDS, ids=lambda guard: guard.__name__)
def test_the_book_is_layered(guard):
    assert guard(ROOT) == []


@pytest.fixture
def small_book(tmp_path):
    "A book of two chapters and an experiment that breaks no rule."
    nbs = tmp_path/'nbs'
    write_notebook(nbs/'00_low.ipynb', '#| default_exp low', '#| export\nX = 1')
    write_notebook(nbs/'01_high.ipynb', '#| default_exp high', '#| export\nfrom golf_nb.low import X')
    write_notebook(nbs/'experiments'/'e01_try.ipynb', 'from golf_nb.high import X')
    (tmp_path/'golf_nb').mkdir()
    (tmp_path/'golf_nb'/'low.py').write_text('X = 1\n')
    (tmp_path/'golf_nb'/'high.py').write_text('from .low import X\n')
    return tmp_path


@pytest.mark.parametrize('guard', GUARDS, ids=lambda guard: guard.__name__)
def test_a_layered_book_passes(guard, small_book):
    assert guard(small_book) == []


@pytest.mark.parametrize('guard, file, content', [
    (upward_imports, 'nbs/00_low.ipynb', 'from golf_nb.high import X'),
    (upward_imports, 'nbs/00_low.ipynb', 'from golf_nb import high'),
    (upward_imports, 'nbs/00_low.ipynb', 'import golf_nb.high as high'),
    (upward_imports, 'nbs/00_low.ipynb', 'def f():\n    from golf_nb.low import X\n    return X'),
    (upward_imports, 'golf_nb/low.py', 'def f():\n    from .high import X\n    return X'),
    (upward_imports, 'golf_nb/low.py', 'from . import high'),
    (upward_imports, 'golf_nb/high.py', 'from .gone import X'),
    (star_imports, 'nbs/01_high.ipynb', 'from golf_nb.low import *'),
    (star_imports, 'nbs/experiments/e01_try.ipynb', 'from math import *'),
    (star_imports, 'golf_nb/high.py', 'from .low import *'),
    (misnamed, 'nbs/01_high.ipynb', '#| default_exp tall'),
    (misnamed, 'nbs/01_twin.ipynb', '#| default_exp twin'),
    (exporting_outsiders, 'nbs/experiments/e01_try.ipynb', '#| export\nX = 1'),
    (exporting_outsiders, 'nbs/index.ipynb', '#| default_exp index'),
])
def test_a_planted_fault_is_found(guard, file, content, small_book):
    path = small_book/file
    if path.suffix == '.py': path.write_text(content)
    else: write_notebook(path, content)
    assert len(guard(small_book)) == 1
