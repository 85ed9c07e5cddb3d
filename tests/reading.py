"How the tests read the book: notebooks, their cells, and the code in them."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent     # nbdev's commands, whether or not the environment is activated


def one_now(values, *now):
    "Parameters of a test (tuples, if it has several): `make test` takes those of `now`, `make test-all` all."
    assert set(now) <= set(values)
    def later(value):
        return pytest.param(*(value if isinstance(value, tuple) else [value]), marks=pytest.mark.long)
    return [value if value in now else later(value) for value in values]


def notebooks(root):
    "The notebooks of the project in `root`, in reading order, without scratch ones (`_name.ipynb`)."
    scratch = lambda path: any(part[0] in '_.' for part in path.relative_to(root).parts)
    return sorted(path for path in (root/'nbs').rglob('*.ipynb') if not scratch(path))


def chapters(root):
    "The notebooks that are a module: `nbs/NN_name.ipynb` of the core, `nbs/wing/NN_name.ipynb` of a wing."
    return [path for path in notebooks(root) if re.fullmatch(r'\d\d_\w+', path.stem)]


def modules(root):
    "The modules of the package, without what nbdev writes alone: its index, and an empty `__init__`."
    def written(path):
        return path.name == '_modidx.py' or path.name == '__init__.py' and '# %%' not in path.read_text()
    return [path for path in sorted((root/'golf_nb').rglob('*.py')) if not written(path)]


def cells(path, kind='code'):
    "The cells of one kind in a notebook."
    return [cell for cell in _notebook(path, path.stat().st_mtime_ns, path.stat().st_size)['cells']
            if cell['cell_type'] == kind]


@lru_cache(None)
def _notebook(path, *version): return json.loads(path.read_text())


def source(cell):
    "The text of a cell, without the lines that only IPython understands."
    return ''.join(line for line in cell['source'] if not re.match(r'\s*[%!]', line))


def exported(cell):
    "Does this cell go into the package?"
    return re.match(r'(\s*#\|.*\n)*\s*#\|\s*exports?i?\b', source(cell)) is not None


def trees(path):
    "The syntax trees of a file: of each code cell of a notebook, or of the one module."
    return _trees(path, path.stat().st_mtime_ns, path.stat().st_size)


@lru_cache(None)
def _trees(path, *version):
    if path.suffix == '.ipynb': return [ast.parse(source(cell)) for cell in cells(path)]
    return [ast.parse(path.read_text())]


def nodes(path, kind):
    "All syntax nodes of one kind in a notebook or a module."
    return [node for tree in trees(path) for node in ast.walk(tree) if isinstance(node, kind)]


def functions(text):
    "Names of the public functions that are defined at the top of `text`."
    found = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    return [name for name in found if name[0] != '_']


def run(*command, cwd=ROOT, code=0):
    "Run `command`, fail with what it printed unless its exit status is `code`, and return its output."
    env = {name: value for name, value in os.environ.items() if name != 'IN_TEST'}   # silences nbdev_export
    env['PATH'] = f'{SCRIPTS}{os.pathsep}{env["PATH"]}'
    command = [shutil.which(command[0], path=env['PATH']) or command[0], *command[1:]]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_notebook(path, *sources, outputs=()):
    "Write a small notebook for a test; sources that begin with `#` and a space are Markdown."
    def cell(i, text):
        base = {'id': f'cell{i}', 'metadata': {}, 'source': text.splitlines(keepends=True)}
        if text.startswith('# '): return base | {'cell_type': 'markdown'}
        return base | {'cell_type': 'code', 'execution_count': None, 'outputs': list(outputs)}
    kernel = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    notebook = {'cells': [cell(i, text) for i, text in enumerate(sources)], 'metadata': kernel,
                'nbformat': 4, 'nbformat_minor': 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + '\n')
    return path
