"Training as it is really used: torchrun, kill -9, resume, several agents."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from golf_nb.report import read_log
from golf_nb.study.grid import toy_text
from golf_nb.train import main

HERE = Path(__file__).parent
SMALL = '''--model.dim 64 --model.hidden 128 --model.vocab 512 --quant.min-numel 2048 --no-compile
--deterministic --data.seq-len 128 --data.batch-tokens 2048 --eval.window 128 --eval.stride 128
--log-every 1'''.split()
FP32 = '--precision fp32 --optim.ns-dtype fp32'.split()
TRAIN = [sys.executable, '-m', 'golf_nb.train']
DISTURBED = [sys.executable, HERE/'disturbed_train.py']
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
TWO = [*TORCHRUN, '--standalone', '--nproc_per_node=2', *TRAIN[1:]]
STEPS = ['--steps', '40']
AGAIN = 'python -m golf_nb.train --resume'


@contextmanager
def started(words, cwd, **changes):
    "A command that was started with one thread a process; what is left of it at the end is killed."
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **changes}
    with subprocess.Popen([str(word) for word in words], cwd=cwd, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try: yield process
        finally: process.kill()


def done(words, cwd, code=0, **changes):
    "Run a command to its end; what it printed."
    with started(words, cwd, **changes) as process: said, complained = process.communicate()
    assert process.returncode == code, said + complained
    return said


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    "Run a command that must fail, in this process; what it complained."
    def run(*words):
        with pytest.raises(SystemExit) as end: main([str(word) for word in words])
        torch.use_deterministic_algorithms(False)
        assert end.value.code
        return f'{end.value.code}\n{capsys.readouterr().err}'
    monkeypatch.chdir(tmp_path)
    return run


def losses(folder):
    "The logged losses, by step."
    return {line['step']: line['nats'] for line in read_log(folder/'log.jsonl')}


def weights(folder):
    "The final weights, as bytes."
    return (folder/'checkpoint'/'weights.safetensors').read_bytes()


def deviation(one, other, steps):
    "The largest relative difference of two runs' losses in their first steps."
    assert losses(one).keys() == losses(other).keys()
    return max(abs(losses(other)[step]/losses(one)[step] - 1) for step in range(1, steps + 1))


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Options of a small run on a small text."
    return [*SMALL, '--data.source', toy_text(tmp_path_factory.mktemp('toy')/'text')]


@pytest.fixture(scope='module')
def fp32(small): return [*small, *FP32, *STEPS]


@pytest.fixture(scope='module')
def undisturbed(fp32, tmp_path_factory):
    "A run in one process, fp32."
    folder = tmp_path_factory.mktemp('undisturbed')/'run'
    done([*TRAIN, *fp32, '--out', folder], folder.parent)
    return folder


def test_a_run_directory_is_complete(undisturbed):
    names = {'config.json', 'data.json', 'log.jsonl', 'checkpoint', 'model.golf', 'scores.json',
             'report.json', 'plots'}
    assert {p.name for p in undisturbed.iterdir()} == names
    report = json.loads((undisturbed/'report.json').read_text())
    assert report['artifact']['total'] == (undisturbed/'model.golf').stat().st_size
    assert sorted(losses(undisturbed)) == list(range(1, 41))


@pytest.mark.long
def test_the_whole_validation_text_is_scored(tmp_path):
    done([*TRAIN, *SMALL, *FP32, '--steps', 1, '--out', tmp_path/'run'], tmp_path)
    scored = json.loads((tmp_path/'run'/'report.json').read_text())['scored']
    assert scored['tokens'] > 200_000 and scored['bytes'] == 703_791


@pytest.mark.long
def test_two_processes_are_one(undisturbed, fp32, tmp_path):
    "The same global batch, split: every loss within 1e-4 of one process's."
    done([*TWO, *fp32, '--out', tmp_path/'run'], tmp_path)
    assert deviation(undisturbed, tmp_path/'run', 20) < 1e-4


@pytest.fixture(scope='module')
def pair(small, tmp_path_factory):
    "A run of two processes in the default types; the first prints at its end which threads it has left."
    place = tmp_path_factory.mktemp('pair')
    (place/'ends.py').write_text(
        'from pathlib import Path\nfrom golf_nb.train import main\nmain()\n'
        'print(*(p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")))\n')
    two = [*TORCHRUN, '--standalone', '--nproc_per_node=2', 'ends.py']
    said = done([*two, *small, '--steps', 5, '--log-every', 2, '--out', place/'run'], place)
    return place/'run', said


@pytest.mark.long
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='threads are listed in /proc')
def test_no_thread_of_the_group_is_left(pair):
    "A thread that outlives its group can abort a process at its end. And the log has the last step."
    folder, said = pair
    assert 'loop' not in said.split('written to')[1]
    assert list(losses(folder)) == [2, 4, 5]


@pytest.mark.long
def test_the_default_types_stay_close(pair, small, tmp_path):
    "In bf16 two processes round differently than one; five steps must still agree to a percent."
    done([*TRAIN, *small, '--steps', 5, '--log-every', 2, '--out', tmp_path/'one'], tmp_path)
    one, two = losses(tmp_path/'one'), losses(pair[0])
    assert one.keys() == two.keys() and max(abs(two[step]/one[step] - 1) for step in one) < 1e-2


@pytest.mark.long
@pytest.mark.parametrize('kills', [1, 10])
def test_killed_at_random_moments(kills, undisturbed, fp32, tmp_path):
    "Killed again and again and resumed each time, a run ends with the same bits as one that was left alone."
    folder = tmp_path/'run'
    words = [*fp32, '--checkpoint-seconds', 0, '--out', folder]
    for seed in range(kills):
        done([*DISTURBED, *words], tmp_path, code=-signal.SIGPROF, DISTURB=f'kill {seed}')
        words = ['--resume', folder]
    assert max(losses(folder)) < 40
    done([*TRAIN, *words], tmp_path)
    assert weights(folder) == weights(undisturbed) and losses(folder) == losses(undisturbed)
    assert {p.name for p in (folder/'checkpoint').iterdir()} == {'latest.safetensors', 'weights.safetensors'}


def test_sigterm_saves_and_says_how_to_go_on(undisturbed, fp32, tmp_path):
    folder = tmp_path/'run'
    with started([*DISTURBED, *fp32, '--out', folder], tmp_path, DISTURB='stop') as run:
        said, complained = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM, said + complained
    assert complained == f'stopped at step 1, which is saved; continue with: {AGAIN} {folder}\n'
    assert max(losses(folder)) == 1
    done([*TRAIN, '--resume', folder], tmp_path)
    assert weights(folder) == weights(undisturbed)


@pytest.mark.long
def test_two_agents_and_a_killed_worker(undisturbed, fp32, tmp_path):
    "Two torchrun agents on one machine train together, and survive the death of a worker."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    folder = tmp_path/'run'
    meet = ['--nnodes=2', '--nproc_per_node=1', '--max-restarts=2',
            '--rdzv-backend=c10d', f'--rdzv-endpoint=127.0.0.1:{port}']
    words = [*TORCHRUN, *meet, DISTURBED[-1], *fp32, '--checkpoint-seconds', 0, '--out', folder]
    changes = {'DISTURB': 'die', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
    with ExitStack() as stack:
        agents = [stack.enter_context(started(words, tmp_path, **changes)) for _ in range(2)]
        said = [''.join(agent.communicate()) for agent in agents]
    assert (tmp_path/'died').exists()
    assert [agent.returncode for agent in agents] == [0, 0], '\n'.join(said)
    assert any('continuing at step' in text for text in said)
    logged, alone = losses(folder), losses(undisturbed)
    assert sorted(logged) == list(range(1, 41))
    assert all(abs(logged[step]/alone[step] - 1) < 1e-4 for step in (1, 2, 3))


def test_a_full_disk_does_not_end_a_run(undisturbed, fp32, tmp_path):
    "No file may grow beyond 200 kB, as on a full disk; after a while there is room again."
    folder = tmp_path/'run'
    said = done([*DISTURBED, *fp32, '--checkpoint-seconds', 0, '--out', folder], tmp_path, DISTURB='disk')
    assert 'no checkpoint: File too large: going on from memory; last one: none was written' in said
    assert weights(folder) == weights(undisturbed) and losses(folder) == losses(undisturbed)


def test_another_configuration_is_refused(undisturbed, refused):
    complaint = refused('--resume', undisturbed, '--optim.matrix-lr', 0.5)
    assert 'optim.matrix_lr: 0.02 -> 0.5' in complaint


def test_an_occupied_folder_is_refused(undisturbed, small, refused):
    complaint = refused(*small, '--steps', 1, '--out', undisturbed)
    assert 'holds a run already' in complaint and '--resume' in complaint


def test_a_damaged_checkpoint_is_refused(undisturbed, refused, tmp_path):
    shutil.copytree(undisturbed, tmp_path/'run')
    path = tmp_path/'run'/'checkpoint'/'latest.safetensors'
    path.write_bytes(path.read_bytes()[:-100])
    assert 'not a sound checkpoint' in refused('--resume', tmp_path/'run')


def test_a_loss_that_is_not_finite_stops_the_run(small, refused, monkeypatch):
    for module in ('train', 'step'):       # a rate that its limits refuse
        monkeypatch.setattr(f'golf_nb.{module}.check', lambda config, processes: None)
    complaint = refused(*small, '--steps', 50, '--optim.scalar-lr', '1e38', '--out', 'run')
    assert 'the loss is nan at step 2, its gradient nan; first not finite: ' in complaint, complaint
    assert 'The step was not taken; last checkpoint: none was written' in complaint


def test_without_a_compiler_the_run_says_so(small, tmp_path):
    "Nothing but python on the path: no C++ compiler."
    (tmp_path/'bin').mkdir()
    words = [word for word in small if word != '--no-compile']
    words = [*TRAIN, *words, '--steps', 2, '--out', tmp_path/'run']
    said = done(words, tmp_path, PATH=str(tmp_path/'bin'), CXX='')
    assert 'no C++ compiler found' in said


@pytest.mark.parametrize('words, said', [
    (['--preset', 'tinny'], "did you mean 'tiny'"),
    (['--data.source', '/nowhere/at/all'], 'nowhere'),
    (['--optim.matrx-lr', '1'], 'matrx-lr'),
])
def test_a_mistake_leaves_nothing_behind(words, said, refused, tmp_path):
    assert said in refused(*words) and not list(tmp_path.iterdir())


def test_a_mistake_as_a_command(tmp_path):
    with started([*TRAIN, '--steps', 'many'], tmp_path) as process: said, complained = process.communicate()
    assert process.returncode != 0 and 'steps' in complained and 'Traceback' not in complained
    assert not said and not list(tmp_path.iterdir())
