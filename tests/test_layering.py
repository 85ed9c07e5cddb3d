"The street plan: a core that is read in order, wings that never touch, and no way to walk in a circle."
import ast
import re

import pytest
from reading import ROOT, cells, chapters, exported, modules, nodes, notebooks, source, write_notebook

CHOOSER = 'runs'      # the one module of the core that may import a wing, and the wing that it may import
CHOSEN = 'kernels'


def module_of(path):
    "The dotted name, inside golf_nb, of what a notebook exports or a module file is: 'audit.stream'."
    folder = '' if path.parent.name in ('nbs', 'golf_nb') else path.parent.name + '.'
    name = path.stem.split('_', 1)[1] if path.suffix == '.ipynb' else path.stem
    return folder + {'init': '__init__', 'main': '__main__'}.get(name, name)


def wing_of(module): return module.rpartition('.')[0]


def floors(root):
    "Module name -> number of its notebook."
    return {module_of(path): path.stem.split('_')[0] for path in chapters(root)}


def known(name, names):
    "The module that a dotted name belongs to: itself, a module above it, or the package's `__init__`."
    while name and name not in names and f'{name}.__init__' not in names: name = name.rpartition('.')[0]
    return name if name in names or not name else f'{name}.__init__'


def import_calls(path):
    "Names given to `import_module` and `__import__`; '' where a name is made while the program runs."
    for call in nodes(path, ast.Call):
        if ast.unparse(call.func).split('.')[-1] not in ('import_module', '__import__'): continue
        texts = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
        yield next((text for text in texts if isinstance(text, str)), '')


def imported(path):
    "Dotted names inside golf_nb that a file imports, wherever in it and however."
    home = wing_of(module_of(path))
    for node in nodes(path, ast.Import):
        yield from (name.name.removeprefix('golf_nb.') for name in node.names
                    if name.name.startswith('golf_nb.'))
    for node in nodes(path, ast.ImportFrom):
        base = node.module or ''
        if node.level: base = '.'.join(part for part in (home if node.level == 1 else '', base) if part)
        elif not base.startswith('golf_nb'): continue
        base = base.removeprefix('golf_nb').lstrip('.')
        yield from (f'{base}.{name.name}'.lstrip('.') for name in node.names)
    for text in import_calls(path):
        if text.startswith('golf_nb.'): yield text.removeprefix('golf_nb.')
        elif text.startswith('.'): yield f'{home}.{text.lstrip(".")}'.lstrip('.')


def streets(root):
    "Of every module: the modules that it imports; of a notebook, exported cells and the others alike."
    names = {module_of(path) for path in chapters(root)} | {module_of(path) for path in modules(root)}
    found = {name: set() for name in names}
    for path in [*modules(root), *chapters(root)]:
        here = module_of(path)
        found[here] |= {known(name, names) or f'{name} (unknown)' for name in imported(path)} - {here}
    return found


def upward_imports(root):
    "Imports of a module that is not below the importer: in the core and inside each wing."
    floor = floors(root)
    return sorted(f'{here} imports {there}, which is not below it' for here, targets in streets(root).items()
                  for there in targets if wing_of(here) == wing_of(there)
                  and floor.get(there, '~') >= floor.get(here, ''))


def wings_that_touch(root):
    "Imports from the core into a wing, except at the one place that chooses kernels, and between wings."
    def allowed(here, there): return wing_of(there) in ('', wing_of(here)) or \
        here == CHOOSER and wing_of(there) == CHOSEN
    return sorted(f'{here} imports {there}, of another wing' for here, targets in streets(root).items()
                  for there in targets if not allowed(here, there))


def circles(root):
    "Ways that lead from a module back to itself."
    ways, found, done = streets(root), [], set()
    def walk(here, path):
        if here in path: found.append(' -> '.join([*path[path.index(here):], here]))
        elif here not in done:
            for there in sorted(ways.get(here, ())): walk(there, [*path, here])
            done.add(here)
    for name in sorted(ways): walk(name, [])
    return found


def imports_of_a_command(root):
    "Imports of a `__main__`, which is for running."
    return sorted(f'{here} imports {there}' for here, targets in streets(root).items()
                  for there in targets if there.endswith('__main__'))


def hidden_imports(root):
    "Imports by a name that is made while the program runs; only a name from outside the project may be."
    def ours(call): return any('golf_nb' in str(getattr(node, 'value', '')) for node in ast.walk(call))
    return [f'{module_of(path)}: {ast.unparse(call)}' for path in modules(root)
            for call in nodes(path, ast.Call)
            if ast.unparse(call.func).split('.')[-1] in ('import_module', '__import__')
            and not isinstance(call.args[0], ast.Constant) and ours(call)]


def star_imports(root):
    "`from x import *`, which hides where a name is from."
    return [f'{path.name}: from {node.module} import *' for path in notebooks(root) + modules(root)
            for node in nodes(path, ast.ImportFrom) if node.names[0].name == '*']


def misnamed(root):
    "Notebooks whose file name does not say what they export, and floors that are used twice or left out."
    found, used = [], {}
    for path in chapters(root):
        default = re.search(r'#\|\s*default_exp\s+(\S+)', '\n'.join(source(cell) for cell in cells(path)))
        if not default or default[1] != module_of(path):
            found.append(f'{path.name} exports {default and default[1]}')
        used.setdefault(wing_of(module_of(path)), []).append(path.stem.split('_')[0])
    for wing, numbers in used.items():
        want = [f'{i:02d}' for i in range(len(numbers))]
        if sorted(numbers) != want: found.append(f'{wing or "core"}: floors {" ".join(sorted(numbers))}')
    return found


def exporting_outsiders(root):
    "Notebooks that export although they are no chapter: the index and the experiments."
    outsiders = [path for path in notebooks(root) if path not in chapters(root)]
    return [path.name for path in outsiders for cell in cells(path)
            if exported(cell) or re.search(r'#\|\s*default_exp', source(cell))]


GUARDS = [upward_imports, wings_that_touch, circles, imports_of_a_command, hidden_imports, star_imports,
          misnamed, exporting_outsiders]


@pytest.mark.parametrize('guard', GUARDS, ids=lambda guard: guard.__name__)
def test_the_book_is_layered(guard):
    assert guard(ROOT) == []


@pytest.fixture
def small_book(tmp_path):
    "A book of a core of three, two wings, and an experiment, that breaks no rule."
    nbs, package = tmp_path/'nbs', tmp_path/'golf_nb'
    pages = {'00_low': 'X = 1', '01_high': 'from golf_nb.low import X',
             '02_runs': 'from golf_nb.kernels.fast import Y',
             'kernels/00_fast': 'from golf_nb.low import X as Y',
             'audit/00_verdict': 'from golf_nb.high import X',
             'audit/01_init': 'from golf_nb.audit.verdict import X',
             'audit/02_main': 'from golf_nb.audit.verdict import X\ndef main(): return X'}
    for name, code in pages.items():
        path = nbs/f'{name}.ipynb'
        write_notebook(path, f'#| default_exp {module_of(path)}', f'#| export\n{code}')
        out = package/f'{module_of(path).replace(".", "/")}.py'
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(code + '\n')
    write_notebook(nbs/'experiments'/'e01_try.ipynb', 'from golf_nb.high import X')
    return tmp_path


@pytest.mark.parametrize('guard', GUARDS, ids=lambda guard: guard.__name__)
def test_a_layered_book_passes(guard, small_book):
    assert guard(small_book) == []


@pytest.mark.parametrize('guard, file, content', [
    (upward_imports, 'nbs/00_low.ipynb', 'from golf_nb.high import X'),
    (upward_imports, 'nbs/00_low.ipynb', 'from golf_nb import high'),
    (upward_imports, 'nbs/00_low.ipynb', 'import golf_nb.high as high'),
    (upward_imports, 'golf_nb/low.py', 'def f():\n    from .high import X\n    return X'),
    (upward_imports, 'golf_nb/low.py',
     'import importlib\ndef f(): return importlib.import_module("golf_nb.high")'),
    (upward_imports, 'golf_nb/low.py', 'def f(): return __import__("golf_nb.high")'),
    (upward_imports, 'golf_nb/audit/verdict.py', 'from . import X'),
    (upward_imports, 'golf_nb/audit/verdict.py', 'from .__init__ import X'),
    (wings_that_touch, 'golf_nb/low.py', 'def f():\n    from .audit.verdict import X\n    return X'),
    (wings_that_touch, 'golf_nb/high.py', 'from .kernels import fast'),
    (wings_that_touch, 'golf_nb/runs.py', 'from .audit import verdict'),
    (wings_that_touch, 'golf_nb/kernels/fast.py', 'from ..audit.verdict import X'),
    (wings_that_touch, 'golf_nb/kernels/fast.py',
     'import importlib\nimportlib.import_module("golf_nb.audit")'),
    (circles, 'golf_nb/low.py', 'from .kernels.fast import Y'),
    (circles, 'golf_nb/low.py',
     'import importlib\ndef f(): return importlib.import_module(".high", __package__)'),
    (imports_of_a_command, 'golf_nb/audit/__init__.py', '# %%\nfrom .__main__ import main'),
    (imports_of_a_command, 'nbs/experiments/../audit/01_init.ipynb', 'import golf_nb.audit.__main__'),
    (hidden_imports, 'golf_nb/high.py',
     'import importlib\ndef f(x): return importlib.import_module(f"golf_nb.{x}")'),
    (star_imports, 'nbs/01_high.ipynb', 'from golf_nb.low import *'),
    (star_imports, 'nbs/experiments/e01_try.ipynb', 'from math import *'),
    (star_imports, 'golf_nb/high.py', 'from .low import *'),
    (misnamed, 'nbs/01_high.ipynb', '#| default_exp tall'),
    (misnamed, 'nbs/01_twin.ipynb', '#| default_exp twin'),
    (misnamed, 'nbs/audit/04_late.ipynb', '#| default_exp audit.late'),
    (exporting_outsiders, 'nbs/experiments/e01_try.ipynb', '#| export\nX = 1'),
    (exporting_outsiders, 'nbs/index.ipynb', '#| default_exp index'),
])
def test_a_planted_fault_is_found(guard, file, content, small_book):
    path = (small_book/file).resolve()
    if path.suffix == '.py': path.write_text(content)
    else: write_notebook(path, content)
    found = guard(small_book)
    assert len(found) >= 1 and (guard in (star_imports, misnamed, exporting_outsiders)
                                or path.stem.split('_', 1)[-1].strip('_') in found[0]), found
