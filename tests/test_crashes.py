"Interrupted or killed at any moment, a run says how it goes on, and goes on."
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import FP32, SMALL, TRAIN

from golf_nb.files import sha256
from golf_nb.study.grid import toy_text

AGAIN = 'continue with: python -m golf_nb.train --resume'
CRASH = Path(__file__).parents[1]/'bench'/'crash.py'


@pytest.fixture(scope='module')
def words(tmp_path_factory):
    "A short run."
    text = toy_text(tmp_path_factory.mktemp('toy')/'text')
    return [*TRAIN, *SMALL, *FP32, '--steps', '20', '--data.source', text]


def interrupted(words, folder, ready, number=signal.SIGINT):
    "Signal all processes of a command, as a terminal does: after some seconds, or when it prints something."
    process = subprocess.Popen([str(word) for word in [*words, '--out', folder]], text=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'}, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if isinstance(ready, float): time.sleep(ready)
    else:
        while ready not in (line := process.stdout.readline()): assert line, process.stderr.read()
    if process.poll() is None: os.killpg(process.pid, number)
    begin = time.monotonic()
    said, complained = process.communicate()
    if process.returncode == 0: return None
    assert process.returncode == 128 + number, said + complained
    assert time.monotonic() - begin < 15
    lines = [line for line in complained.splitlines() if line.strip()]
    assert len(lines) == 1, complained
    return lines[0]


@pytest.mark.parametrize('ready, number, kept', [
    (0.6, signal.SIGINT, 'nothing was changed'),
    ('training ...', signal.SIGTERM, f'which is saved; {AGAIN}'),
    ('packing:', signal.SIGINT, f'holds all that was trained; {AGAIN}'),
], ids=['imports', 'training', 'scoring'])
def test_a_run_that_is_interrupted_says_what_is_kept(ready, number, kept, words, tmp_path):
    said = interrupted(words, tmp_path/'run', ready, number)
    if said is None:                      # the signal came in a place that cannot raise, and the run ended
        shutil.rmtree(tmp_path/'run')
        said = interrupted(words, tmp_path/'run', ready, number)
    assert kept in said
    assert not list(tmp_path.rglob('.*'))
    assert (tmp_path/'run').exists() == ('nothing' not in kept)


@pytest.mark.long
def test_interrupted_at_twenty_moments(words, tmp_path):
    "Each time one line, and what it says is true: the run goes on to the same artifact."
    begin = time.monotonic()
    subprocess.run([str(word) for word in [*words, '--quiet', '--out', tmp_path/'alone']], check=True)
    seconds, draw = time.monotonic() - begin, random.Random(3)
    for number in range(20):
        folder = tmp_path/str(number)
        kind = (signal.SIGINT, signal.SIGTERM)[number % 2]
        said = interrupted(words, folder, draw.uniform(0.4, seconds), kind)
        if said is None: continue
        again = [*TRAIN, '--resume', folder] if 'continue with' in said else [*words, '--out', folder]
        subprocess.run([str(word) for word in [*again, '--quiet']], check=True)
        assert (folder/'model.golf').read_bytes() == (tmp_path/'alone'/'model.golf').read_bytes(), said


@pytest.mark.long
def test_killed_and_resumed(tmp_path):
    "The short form of `bench/crash.py`, which kills a hundred runs."
    found = subprocess.run([sys.executable, CRASH, '--runs', '6'], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert '6 of 6 runs ended with the same artifact' in found.stdout


@pytest.mark.long
def test_a_finished_run_goes_on(words, tmp_path):
    "More steps than planned: everything is replaced, at the end; the report says where."
    run, resume = tmp_path/'run', [*TRAIN, '--resume', tmp_path/'run']
    subprocess.run([str(word) for word in [*words, '--quiet', '--out', run]], check=True)
    before = {name: sha256((run/name).read_bytes()) for name in ('model.golf', 'report.json', 'scores.json')}
    words = [str(word) for word in [*resume, '--steps', 40]]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert '20 steps become 40 steps' in said and 'rates rise from 0.0 to' in said
    assert all(sha256((run/name).read_bytes()) != value for name, value in before.items())
