"A run goes on, and is read, only with what it was made with; whoever refuses has changed nothing."
import json
import os
import shutil
import signal

import pytest
import torch

from golf_nb import trainer
from golf_nb.artifact import read_header, save
from golf_nb.runs import RunError, open_data, open_run
from golf_nb.study.grid import toy_text
from golf_nb.train import main, read_command
from golf_nb.trainer import Stopped

TINY = '''--precision fp32 --optim.ns-dtype fp32 --no-compile --log-every 2 --model.dim 32 --model.hidden 64
--model.vocab 400 --model.bigram.buckets 64 --quant.min-numel 500 --data.seq-len 32 --data.batch-tokens 256
--eval.window 32 --eval.stride 32 --steps 8'''.split()


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "A run that Ctrl-C stopped after five of eight steps, and its texts, given by a relative path."
    place = tmp_path_factory.mktemp('begun')
    toy_text(place/'text')
    train_step, patch = trainer.train_step, pytest.MonkeyPatch()
    def interrupted(run):
        train_step(run)
        if run.step == 5: os.kill(os.getpid(), signal.SIGINT)
    with patch.context() as changes:
        changes.chdir(place)
        changes.setattr(trainer, 'train_step', interrupted)
        with pytest.raises(Stopped, match='stopped at step 5'):
            trainer.train(read_command([*TINY, '--data.source', 'text']).run, place/'run')
    config, dataset = open_run(place/'run')
    identity = dataset.identity
    save(place/'run'/'model.golf', {'x': torch.zeros(2)}, {name: identity[name] for name in ('tokenizer',)})
    for name in ('scores.json', 'report.json'): (place/'run'/name).write_text('{"of": "yesterday"}')
    return place


@pytest.fixture
def run(begun, tmp_path):
    "A copy of it, with texts of its own."
    shutil.copytree(begun/'run', tmp_path/'run')
    shutil.copytree(begun/'text', tmp_path/'text')
    return tmp_path/'run'


def content(folder): return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def drift(texts):
    "A word is corrected."
    for path in texts.glob('*.txt'): path.write_text(path.read_text().replace(' the ', ' that '))


def refused(*words):
    "What the command says when it refuses."
    with pytest.raises(SystemExit) as end: main([str(word) for word in words])
    said = str(end.value.code)
    assert said.startswith('error: ') and '\n' not in said
    return said


def test_data_is_recorded_where_it_is(begun):
    "An absolute place; a hash for each part; the same hash in the artifact."
    facts = json.loads((begun/'run'/'data.json').read_text())
    assert facts['source'] == str(begun/'text') == open_run(begun/'run')[0].data.source
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in facts['identity'].values())
    assert read_header(begun/'run'/'model.golf')['about']['tokenizer'] == facts['identity']['tokenizer']


@pytest.mark.parametrize('change', [
    drift,
    lambda texts: (texts/'one-more.txt').write_text('a word that nobody has used so far\n'*50),
    lambda texts: next(texts.glob('*.txt')).unlink(),
], ids=['a word', 'one more', 'one less'])
def test_other_texts_are_refused_by_all(change, run, tmp_path):
    before = open_run(run, str(tmp_path/'text'))[1]
    change(tmp_path/'text')
    kept = content(run)
    said = refused('--resume', run, '--data.source', tmp_path/'text')
    recorded = json.loads((run/'data.json').read_text())['identity']
    assert f'tokenizer: {recorded["tokenizer"]} -> ' in said and f'in {tmp_path/"text"} is not' in said
    with pytest.raises(RunError, match=before.tokenizer.fingerprint): open_run(run, str(tmp_path/'text'))
    assert content(run) == kept                            # scores of yesterday, too


def test_data_may_move(run, tmp_path):
    "Moved texts are the same texts: the run goes on where it was, and remembers the new place."
    (tmp_path/'text').rename(tmp_path/'elsewhere')
    config, dataset = open_run(run, str(tmp_path/'elsewhere'))
    step = trainer.start(config, dataset, trainer.Process())
    assert trainer.resume(step, run) and step.step == 5


def test_a_run_without_a_record(run, tmp_path, capsys):
    "An older run has the fingerprint in its report, if it is finished; if not, its reader is told."
    dataset = open_data(open_run(run)[0])
    for name in ('data.json', 'model.golf'): (run/name).unlink()
    open_run(run)
    assert 'cannot be checked' in capsys.readouterr().err
    (run/'report.json').write_text(json.dumps({'dataset': dataset.fingerprint}))
    open_run(run)
    assert not capsys.readouterr().err
    drift(tmp_path/'text')
    with pytest.raises(RunError, match=f'fingerprint: {dataset.fingerprint} -> .*report.json'):
        open_run(run, str(tmp_path/'text'))
    complaint = refused('--resume', run, '--data.source', tmp_path/'text')
    assert dataset.fingerprint in complaint


def test_an_artifact_of_another_tokenizer_is_refused(run):
    save(run/'model.golf', {'x': torch.zeros(2)}, {'tokenizer': 16*'0'})
    with pytest.raises(RunError, match=f'tokenizer: {16*"0"} -> .*model.golf'): open_run(run)


@pytest.mark.parametrize('budget, said', [
    (['--steps', '4'], '--steps 4: 5 steps are taken already'),
    (['--seconds', '0.001'], 'are spent already'),
])
def test_less_than_is_spent_is_refused(budget, said, run):
    kept = content(run)
    assert said in refused('--resume', run, *budget)
    assert content(run) == kept


@pytest.mark.parametrize('spoil, said', [
    (lambda run: (run/'config.json').write_text('{"preset": "ti'), 'config.json is cut short or spoiled'),
    (lambda run: (run/'data.json').write_text('[]'), 'data.json is spoiled'),
    (lambda run: os.truncate(run/'checkpoint'/'latest.safetensors', 5000), 'not a sound checkpoint'),
], ids=['config', 'data', 'checkpoint'])
def test_spoiled_files_are_named(spoil, said, run):
    spoil(run)
    assert said in refused('--resume', run)


@pytest.mark.parametrize('left', ['', '{"step": 2, "na', 'noise\n'], ids=['empty', 'cut', 'noise'])
def test_a_log_that_lost_lines_is_mended(left, run):
    "The checkpoint keeps the last line; a finished run has a curve again, if a short one."
    (run/'log.jsonl').write_text(left)
    config, dataset = open_run(run)
    again = trainer.start(config, dataset, trainer.Process())
    trainer.resume(again, run)
    assert 'step 4 is back' in trainer.trim_log(run, again.step, again.logged)
    assert [line['step'] for line in trainer.read_log(run/'log.jsonl')] == [4]
