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


def test_a_module_that_is_no_command_names_one_that_is():
    def complaint(module):
        words = [sys.executable, '-X', 'importtime', '-m', module]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and ' torch' not in done.stderr
        return done.stderr.splitlines()[-1]
    assert 'golf_nb.evalute is no command, but golf_nb.evaluate is;' in complaint('golf_nb.evalute')
    assert 'golf_nb.study.findings and golf_nb.study.grid are;' in complaint('golf_nb.study.measures')


SELF = 'import os, signal\n' + WORK.replace('time.sleep(.05)', 'os.kill(os.getpid(), signal.SIGINT)')


def test_a_phase_that_stops_early_says_so():
    done = subprocess.run([sys.executable, '-c', SELF], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and 'training: stopped after 0.' in done.stdout
    assert done.stderr == 'interrupted: half is kept; go on with: x\n'


def test_of_several_processes_the_first_one_speaks():
    for rank, said in (('0', 'interrupted: half is kept; go on with: x\n'), ('1', '')):
        done = subprocess.run([sys.executable, '-c', SELF], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, 'RANK': rank})
        assert (done.returncode, done.stderr) == (130, said)


def test_an_ignored_interrupt_stays_ignored():
    "A shell starts `command &` so, and Ctrl-C is then meant for another."
    code = SELF.replace('take_over()', 'signal.signal(signal.SIGINT, signal.SIG_IGN)\ntake_over()', 1)
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '') and done.stdout.endswith('done\n')


def test_work_of_unknown_size_is_counted_in_a_terminal():
    said = in_terminal(WORK.replace("'training', 40, 'steps'", "'probing', None, 'answers'"))
    assert 'probing: 20 answers [00:0' in said and '?it' not in said
