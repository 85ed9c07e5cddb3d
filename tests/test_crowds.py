"More than one process: two runs that want one folder, a wrong number, a port that is taken; and no room."
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
from test_train import FP32, SMALL, TORCHRUN, TRAIN

from golf_nb.files import claimed
from golf_nb.study.grid import toy_text

FEW = [*SMALL, *FP32, '--steps', '2']


def ended(words, cwd, seconds=60, **options):
    "Run a command; its exit status, and its lines on both streams."
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **options.pop('env', {})}
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, text=True,
                          capture_output=True, timeout=seconds, **options)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def refused(words, cwd, **options):
    "The one line of a command that is refused before torch is imported."
    watch = ('import sys\nfrom golf_nb.train import main\n'
             'try: main()\nfinally: assert "torch" not in sys.modules')
    status, said, complained = ended([sys.executable, '-c', watch, *words], cwd, **options)
    assert status == 1 and not said and len(complained) == 1, complained
    return complained[0]


@pytest.fixture(scope='module')
def text(tmp_path_factory): return toy_text(tmp_path_factory.mktemp('toy')/'text')


def test_a_folder_has_one_run(tmp_path):
    "The second one is refused while the first one holds it, begun or not, and whoever asks."
    with claimed(tmp_path/'run'):
        for words in (['--out', 'run'], ['--out', tmp_path/'run']):
            assert 'another process works in this folder' in refused([*FEW, *words], tmp_path)
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('place, said', [
    ('/proc/x', '/proc/x: No such file or directory; choose another folder'),
    ('a-file/run', 'a-file/run: Not a directory; choose another folder'),
])
def test_a_folder_that_cannot_be_made_is_named(place, said, tmp_path):
    (tmp_path/'a-file').touch()
    assert refused([*FEW, '--out', place], tmp_path).endswith(said)


THEIRS = """
import os, sys
from golf_nb.files import claimed
from golf_nb.train import main, read_command
read_command(sys.argv[1:])                  # all that another user might not be allowed to import
with claimed('mine'): pass
os.mkdir('theirs', 0o555)
if os.geteuid() == 0: os.setuid(65534)      # root may write anywhere
main(sys.argv[1:])
"""


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    "Read-only, or some other user's."
    for folder in (tmp_path, *list(tmp_path.parents)[:3]): folder.chmod(0o755)
    status, said, complained = ended([sys.executable, '-c', THEIRS, *FEW, '--out', 'theirs/run'], tmp_path)
    assert status == 1 and len(complained) == 1, complained
    assert complained[0].endswith('theirs/run: Permission denied; choose another folder')


def no_room():
    "A full disk: no file may grow."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def test_no_room_for_a_run(text, tmp_path):
    "One line that names the file, and nothing is left: the folder that was made for it is removed."
    words = [*TRAIN, *FEW, '--data.source', text, '--quiet', '--out', 'run']
    ended([*TRAIN, *FEW, '--data.source', text, '--explain'], tmp_path)
    status, said, complained = ended(words, tmp_path, preexec_fn=no_room)
    assert status == 1 and not said and len(complained) == 1, complained
    assert 'run/config.json' in complained[0] and 'File too large' in complained[0]
    assert not (tmp_path/'run').exists()


@pytest.mark.long
def test_a_wrong_number_of_processes(text, tmp_path):
    "Three processes cannot divide a step; one of them says so. What torchrun itself reports is not ours."
    three = [*TORCHRUN, '--standalone', '--nproc_per_node=3', *TRAIN[1:]]
    status, said, complained = ended([*three, *FEW, '--data.source', text, '--out', 'run'], tmp_path, 120)
    ours = [line for line in complained if line.startswith('error: ')]
    assert status == 1 and len(ours) == 1 and '2048' in ours[0], complained
    assert not (tmp_path/'run').exists()


@pytest.mark.long
def test_a_port_that_is_taken(text, tmp_path):
    "Without torchrun, as on a cluster that starts the processes itself."
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        group = {'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        words = [*TRAIN, *FEW, '--data.source', text, '--out', 'run']
        status, said, complained = ended(words, tmp_path, 120, env=group)
    assert status == 1 and f'127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT): another program' in complained[-1]
    assert not any('Traceback' in line for line in complained) and not (tmp_path/'run').exists()


@pytest.mark.long
def test_two_runs_at_once(text, tmp_path):
    "Both begin at the same time with the same folder: one trains, one is refused in one line."
    words = [str(word) for word in [*TRAIN, *FEW, '--data.source', text, '--out', 'run']]
    both = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    begin = time.monotonic()
    ends = sorted((process.communicate()[1], process.returncode) for process in both)
    assert [status for _, status in ends] == [0, 1] and time.monotonic() - begin < 120
    assert 'another process works in this folder' in ends[1][0] and ends[1][0].count('\n') == 1
    assert not list((tmp_path/'run').glob('.*'))
