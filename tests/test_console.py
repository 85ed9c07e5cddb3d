"What commands say, and how they end, in real terminals and real files."
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from reading import ROOT

WORK = '''
import sys, time
from golf_nb.console import Console, kept, run, take_over
take_over()
def main():
    console = Console()
    console.say('tiny')
    with kept('half is kept; go on with: x'), console.phase('training', 40, 'steps') as phase:
        for step in range(40):
            time.sleep(.05)
            phase.at(step + 1, f'loss {4 - step/40:.2f}')
    print('done')
run(main)
'''
IGNORES = WORK.replace('time.sleep(.05)', '''
            try: time.sleep(.05)
            except KeyboardInterrupt: pass''')


def in_terminal(code):
    "Run code whose output is a terminal; what it wrote there."
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, '-c', code], stdout=slave, stderr=slave, cwd=ROOT) as process:
        os.close(slave)
        said = b''
        while True:
            try: part = os.read(master, 4096)
            except OSError: break              # the other end is closed
            if not part: break
            said += part
        process.wait()
    os.close(master)
    return said.decode()


def test_a_bar_in_a_terminal_and_no_lines():
    said = in_terminal(WORK)
    assert 'training:  50%' in said and 'loss 3.' in said and 'steps [' in said
    assert 'training ...' not in said and said.rstrip().endswith('done')


def test_lines_in_a_file_and_no_bar(tmp_path):
    with open(tmp_path/'log', 'w') as log:
        subprocess.run([sys.executable, '-c', WORK], stdout=log, stderr=log, cwd=ROOT, check=True)
    first, begun, ended, last = (tmp_path/'log').read_text().splitlines()
    assert first == 'tiny' and begun.endswith(' training ...') and last == 'done'
    assert 'training: ' in ended and ended.endswith('loss 3.02') and '%' not in ended


@pytest.mark.parametrize('code, number, status', [
    (WORK, signal.SIGINT, 130), (WORK, signal.SIGTERM, 143), (IGNORES, signal.SIGINT, 130)])
def test_a_signal_ends_in_one_line(code, number, status):
    code = code.replace('take_over()\n', "take_over()\nfrom golf_nb import console\nconsole.GRACE = 1.\n", 1)
    code = code.replace('range(40)', 'range(400)')
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    with subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, text=True, **pipes) as process:
        for line in process.stdout:
            if 'training ...' in line: break
        time.sleep(.2)
        process.send_signal(number)
        _, complained = process.communicate(timeout=20)
    assert process.returncode == status
    assert complained.strip() == 'interrupted: half is kept; go on with: x'


def test_whoever_imports_the_package_keeps_his_signals():
    code = ('import golf_nb, signal, sys; from golf_nb import console; '
            'assert signal.getsignal(signal.SIGINT) is signal.default_int_handler; '
            'assert sys.excepthook is sys.__excepthook__; assert "tqdm" not in sys.modules')
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_the_commands_are_listed():
    def run(module):
        return subprocess.run([sys.executable, '-m', module], cwd=ROOT, capture_output=True, text=True)
    said = run('golf_nb')
    assert '  train ' in said.stdout and '  audit ' in said.stdout and not said.stderr and not said.returncode
    for module in ('golf_nb.model', 'golf_nb.study.measures'):
        found = run(module)
        assert found.returncode == 2 and f'{module} is no command' in found.stderr
        assert found.stderr.count('\n') == 1
