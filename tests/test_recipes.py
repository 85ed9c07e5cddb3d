"Every system's own recipe, at mini scale: one process or two, killed or not, the same run."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from golf_nb.report import read_log

HERE = Path(__file__).parent
RECIPES = ['cycle', 'hybrid', 'universal', 'replay', 'loop3']


def fitted(preset, folder, *options, processes=1, kill_at=None):
    "Train a few steps of a preset in `folder`; with `kill_at`, kill -9 once that step is saved."
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    words = [sys.executable, *(torchrun if processes > 1 else []), HERE/'fit_only.py', preset, folder, *options]
    process = subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    latest = folder/'checkpoint'/'latest.safetensors'
    def saved(): return latest.exists() and facts(folder)['step'] >= kill_at
    if kill_at is not None:
        while process.poll() is None and not saved(): time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, 'the run was over before it could be killed'
        return
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said


def facts(folder):
    "What a checkpoint says of its run."
    with safe_open(folder/'checkpoint'/'latest.safetensors', 'pt') as file: return json.loads(file.metadata()['run'])


def tensors(folder):
    "All that a checkpoint holds: weights, optimizer states, averages."
    with safe_open(folder/'checkpoint'/'latest.safetensors', 'pt') as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def equal(one, other):
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder):
    return {line['step']: line['nats'] for line in read_log(folder/'log.jsonl')}


@pytest.mark.parametrize('preset', RECIPES)
def test_a_recipe_in_two_processes_and_after_kill_9(preset, tmp_path):
    "Twenty steps in fp32: two processes within 1e-4, and a run that was killed and resumed bit for bit."
    fitted(preset, tmp_path/'one')
    fitted(preset, tmp_path/'two', processes=2)
    one, two = losses(tmp_path/'one'), losses(tmp_path/'two')
    assert list(one) == list(two) == [*range(1, 21)]
    assert max(abs(two[step]/one[step] - 1) for step in one) < 1e-4
    assert one[20] < one[1] - 0.2
    fitted(preset, tmp_path/'killed', '--checkpoint-seconds', 0, kill_at=8)
    assert not equal(tmp_path/'one', tmp_path/'killed')
    fitted(preset, tmp_path/'killed')
    assert equal(tmp_path/'one', tmp_path/'killed') and losses(tmp_path/'killed') == one


@pytest.mark.parametrize('kind', ['tied', 'fresh'])
def test_noise_is_the_same_in_two_processes_and_after_kill_9(kind, tmp_path):
    "A run that one process begins and two others end: the noise belongs to the step, not to who draws it."
    options = '--qat', kind, '--steps', 8, '--tokens', 512
    fitted('cycle', tmp_path/'one', *options)
    fitted('cycle', tmp_path/'killed', *options, '--checkpoint-seconds', 0, kill_at=3)
    fitted('cycle', tmp_path/'killed', *options, processes=2)
    one, two = losses(tmp_path/'one'), losses(tmp_path/'killed')
    assert list(one) == list(two) and max(abs(two[step]/one[step] - 1) for step in one) < 1e-4
