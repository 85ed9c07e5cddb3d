"Help comes at once: a command that only explains itself must not wait for torch."
import sys

import pytest
from reading import run

# Runs a module as `python -m` does, and then prints whether torch came with it.
ASK = """
import runpy, sys
module, sys.argv[1:] = sys.argv[1], sys.argv[2:]
try: runpy.run_module(module, run_name='__main__', alter_sys=True)
except SystemExit as stop:
    if stop.code: raise
print('torch was imported' if 'torch' in sys.modules else 'no torch')
"""


@pytest.mark.parametrize('module', ['train', 'evaluate', 'ttt', 'report', 'study.grid', 'authoring.book'])
def test_help_does_not_import_torch(module):
    shown = run(sys.executable, '-c', ASK, f'golf_nb.{module}', '--help')
    assert 'usage:' in shown.lower() and shown.splitlines()[-1] == 'no torch'


def test_torch_would_be_noticed(tmp_path):
    (tmp_path/'planted.py').write_text('import sys\nimport torch\nprint("usage: planted")\nsys.exit(0)\n')
    shown = run(sys.executable, '-c', ASK, 'planted', '--help', cwd=tmp_path)
    assert shown.splitlines() == ['usage: planted', 'torch was imported']
