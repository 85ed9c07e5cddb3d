"Training as it is really used: torchrun, kill -9, resume, several agents."
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from golf_nb.report import read_log

SMALL = '''--model.dim 64 --model.hidden 128 --model.vocab 512 --quant.min-numel 2048 --no-compile
--deterministic --data.seq-len 128 --data.batch-tokens 2048 --eval.window 128 --eval.stride 128
--log-every 1'''.split()
FP32 = '--precision fp32 --optim.ns-dtype fp32'.split()
TRAIN = [sys.executable, '-m', 'golf_nb.train']
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
TWO = [*TORCHRUN, '--standalone', '--nproc_per_node=2', *TRAIN[1:], *SMALL]
STEPS = ['--steps', '60']


def started(words, cwd, **changes):
    "Start a command with one thread a process."
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **changes}
    return subprocess.Popen([str(word) for word in words], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def done(words, cwd, **changes):
    "Run a command to its end; what it printed."
    process = started(words, cwd, **changes)
    said, complained = process.communicate(timeout=240)
    assert process.returncode == 0, said + complained
    return said


def refused(words, cwd):
    "Run a command that must fail without a traceback; what it complained."
    process = started(words, cwd)
    said, complained = process.communicate(timeout=240)
    assert process.returncode != 0 and 'Traceback' not in complained, said + complained
    return complained + said


def losses(folder):
    "The logged losses, by step."
    return {line['step']: line['nats'] for line in read_log(folder/'log.jsonl')}


def wait_for(condition, process):
    "Wait until something is so, or the process has ended."
    while process.poll() is None and not condition(): time.sleep(0.01)


def weights(folder):
    "The final weights, as bytes."
    return (folder/'checkpoint'/'weights.safetensors').read_bytes()


def deviation(one, other, steps):
    "The largest relative difference of two runs' losses in their first steps."
    assert losses(one).keys() == losses(other).keys()
    return max(abs(losses(other)[step]/losses(one)[step] - 1) for step in range(1, steps + 1))


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    "A run in one process, fp32."
    folder = tmp_path_factory.mktemp('undisturbed')/'run'
    done([*TRAIN, *SMALL, *FP32, *STEPS, '--out', folder], folder.parent)
    return folder


def test_a_run_directory_is_complete(undisturbed):
    names = {'config.json', 'log.jsonl', 'checkpoint', 'model.golf', 'scores.json', 'report.json', 'plots'}
    assert {p.name for p in undisturbed.iterdir()} == names
    report = json.loads((undisturbed/'report.json').read_text())
    assert report['artifact']['total'] == (undisturbed/'model.golf').stat().st_size
    assert report['scored']['tokens'] > 200_000 and report['scored']['bytes'] == 703_791
    assert sorted(losses(undisturbed)) == list(range(1, 61))


def test_two_processes_are_one(undisturbed, tmp_path):
    "The same global batch, split: every loss within 1e-4 of one process's."
    done([*TWO, *FP32, *STEPS, '--out', tmp_path/'run'], tmp_path)
    assert deviation(undisturbed, tmp_path/'run', 20) < 1e-4


def test_the_default_types_stay_close(tmp_path):
    "In bf16 two processes round differently than one; five steps must still agree to a percent."
    done([*TRAIN, *SMALL, '--steps', 5, '--out', tmp_path/'one'], tmp_path)
    done([*TWO, '--steps', 5, '--out', tmp_path/'two'], tmp_path)
    assert deviation(tmp_path/'one', tmp_path/'two', 5) < 1e-2


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='threads are listed in /proc')
def test_no_thread_of_the_group_is_left(tmp_path):
    "A thread that outlives its group can abort a process at its end. And the log has the last step."
    (tmp_path/'ends.py').write_text(
        'from pathlib import Path\nfrom golf_nb.train import main\nmain()\n'
        'print(*(p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")))\n')
    words = [*TORCHRUN, '--standalone', '--nproc_per_node=2', 'ends.py', *SMALL, '--out', tmp_path/'run']
    said = done([*words, '--steps', 3, '--log-every', 2], tmp_path)
    assert 'loop' not in said.split('written to')[1]
    assert list(losses(tmp_path/'run')) == [2, 3]


def test_kill_9_at_ten_random_moments(undisturbed, tmp_path):
    "Killed ten times and resumed each time, a run ends with the same bits as one that was left alone."
    folder, chance, kills = tmp_path/'run', random.Random(0), 0
    words = [*TRAIN, *SMALL, *FP32, *STEPS, '--checkpoint-seconds', 0, '--out', folder]
    log = folder/'log.jsonl'
    while kills < 10:
        before = log.read_text() if log.exists() else ''
        process = started(words, tmp_path)
        wait_for(lambda before=before: log.exists() and log.read_text() > before, process)  # one step further
        time.sleep(0.1*chance.random())
        finished = process.poll() is not None
        process.kill()
        process.communicate()
        if finished: break
        kills += 1
        resumable = (folder/'checkpoint'/'latest.safetensors').exists()
        words = [*TRAIN, '--resume', folder] if resumable else words
        if not resumable: shutil.rmtree(folder)
    done(words, tmp_path)
    assert kills == 10, 'the run was over before it could be killed ten times'
    assert weights(folder) == weights(undisturbed) and losses(folder) == losses(undisturbed)
    assert {p.name for p in (folder/'checkpoint').iterdir()} == {'latest.safetensors', 'weights.safetensors'}


def test_sigterm_saves_and_says_how_to_go_on(undisturbed, tmp_path):
    folder = tmp_path/'run'
    process = started([*TRAIN, *SMALL, *FP32, *STEPS, '--out', folder], tmp_path)
    wait_for(lambda: losses(folder), process)
    process.send_signal(signal.SIGTERM)
    said, complained = process.communicate(timeout=60)
    assert process.returncode == 0 and f'--resume {folder}' in said, said + complained
    done([*TRAIN, '--resume', folder], tmp_path)
    assert weights(folder) == weights(undisturbed)


def test_two_agents_and_a_killed_worker(undisturbed, tmp_path):
    "Two torchrun agents on one machine train together, and survive the death of a worker."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    folder = tmp_path/'run'
    meet = ['--nnodes=2', '--nproc_per_node=1', '--max-restarts=2',
            '--rdzv-backend=c10d', f'--rdzv-endpoint=127.0.0.1:{port}']
    options = [*SMALL, *FP32, *STEPS, '--checkpoint-seconds', 0, '--out', folder]
    words = [*TORCHRUN, *meet, *TRAIN[1:], *options]
    agents = [started(words, tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1') for _ in range(2)]
    wait_for(lambda: len(losses(folder)) >= 3, agents[0])
    children = Path(f'/proc/{agents[1].pid}/task/{agents[1].pid}/children').read_text()
    os.kill(int(children.split()[0]), signal.SIGKILL)
    said = [''.join(agent.communicate(timeout=200)) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], '\n'.join(said)
    assert any('continuing at step' in text for text in said)
    logged, alone = losses(folder), losses(undisturbed)
    assert sorted(logged) == list(range(1, 61))
    assert all(abs(logged[step]/alone[step] - 1) < 1e-4 for step in (1, 2, 3))


def test_a_full_disk_does_not_end_a_run(undisturbed, tmp_path):
    "No file may grow beyond 200 kB, as on a full disk; after a while there is room again."
    folder, (soft, hard) = tmp_path/'run', resource.getrlimit(resource.RLIMIT_FSIZE)
    def fill(): resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    words = [*TRAIN, *SMALL, *FP32, *STEPS, '--checkpoint-seconds', 0, '--out', folder]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([str(word) for word in words], cwd=tmp_path, env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=fill)
    wait_for(lambda: len(losses(folder)) >= 5, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert 'no checkpoint: File too large: going on from memory; last one: none was written' in said
    assert weights(folder) == weights(undisturbed) and losses(folder) == losses(undisturbed)


def test_another_configuration_is_refused(undisturbed, tmp_path):
    complaint = refused([*TRAIN, '--resume', undisturbed, '--optim.matrix-lr', 0.5], tmp_path)
    assert 'optim.matrix_lr: 0.02 -> 0.5' in complaint


def test_an_occupied_folder_is_refused(undisturbed, tmp_path):
    complaint = refused([*TRAIN, *SMALL, '--steps', 1, '--out', undisturbed], tmp_path)
    assert 'holds a run already' in complaint and '--resume' in complaint


def test_a_damaged_checkpoint_is_refused(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path/'run')
    path = tmp_path/'run'/'checkpoint'/'latest.safetensors'
    path.write_bytes(path.read_bytes()[:-100])
    assert 'not a sound checkpoint' in refused([*TRAIN, '--resume', tmp_path/'run'], tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    words = [*TRAIN, *SMALL, '--steps', 50, '--optim.scalar-lr', '1e38', '--out', tmp_path/'run']
    complaint = refused(words, tmp_path)
    assert 'the loss is nan at step 2, its gradient nan; first not finite: ' in complaint, complaint
    assert 'The step was not taken; last checkpoint: none was written' in complaint


def test_without_a_compiler_the_run_says_so(tmp_path):
    "Nothing but python on the path: no C++ compiler."
    (tmp_path/'bin').mkdir()
    words = [word for word in SMALL if word != '--no-compile']
    words = [*TRAIN, *words, '--steps', 2, '--out', tmp_path/'run']
    said = done(words, tmp_path, PATH=str(tmp_path/'bin'), CXX='')
    assert 'no C++ compiler found' in said


@pytest.mark.parametrize('words, said', [
    (['--preset', 'tinny'], "did you mean 'tiny'"),
    (['--steps', 'many'], 'steps'),
    (['--data.source', '/nowhere/at/all'], 'nowhere'),
    (['--optim.matrx-lr', '1'], 'matrx-lr'),
])
def test_a_mistake_leaves_nothing_behind(words, said, tmp_path):
    assert said in refused([*TRAIN, *words], tmp_path)
    assert not list(tmp_path.iterdir())
