"Help comes at once, on any console, and whoever reads it: a command that only explains itself."
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reading import ROOT, run

from golf_nb.__main__ import COMMANDS
from golf_nb.console import is_command

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


def test_the_list_of_commands_is_complete():
    package = ROOT/'golf_nb'
    names = ['.'.join(path.relative_to(package).with_suffix('').parts) for path in package.rglob('*.py')]
    found = {name.removesuffix('.__main__') for name in names} - {'__main__'}
    assert {name for name in found if is_command(f'golf_nb.{name}')} == set(COMMANDS)


def tried(*words, **options):
    "Exit status, standard output, and standard error of a command."
    options = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True} | options
    done = subprocess.run([sys.executable, '-m', *words], cwd=ROOT, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('command', COMMANDS)
def test_help_on_a_console_that_knows_ascii_only(command):
    plain = {**os.environ, 'PYTHONIOENCODING': 'ascii', 'PYTHONUTF8': '0', 'LANG': 'C'}
    status, said, complained = tried(f'golf_nb.{command}', '--help', env=plain)
    assert status == 0 and f'usage: python -m golf_nb.{command}' in said and said.isascii() and not complained


BUFFERED = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}


@pytest.mark.parametrize('words', [['golf_nb'], ['golf_nb.train', '--help'], ['golf_nb.data', '--help']])
def test_help_that_nobody_reads(words):
    "As with `| head -1`, once it has ended."
    read, write = os.pipe()
    os.close(read)
    assert tried(*words, stdout=write, env=BUFFERED) == (1, None, '')
    os.close(write)


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs a disk that is full')
@pytest.mark.parametrize('words', [['golf_nb'], ['golf_nb.data', '--help']])
def test_help_on_a_full_disk(words):
    with open('/dev/full', 'w') as full: status, _, complained = tried(*words, stdout=full, env=BUFFERED)
    assert status == 1 and complained == ('error: standard output: No space left on device: free some space, '
                                          'then run the same command again\n')


def test_a_closed_output_is_no_error():
    words = ['/bin/sh', '-c', f'exec {sys.executable} -m golf_nb >&-']
    done = subprocess.run(words, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b'')
