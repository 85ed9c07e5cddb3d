"Commands on bad days: Ctrl-C at any moment, a full disk, a reader that has gone, a poor console, other data."
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from golf_nb import audit, evaluate
from golf_nb.audit.command import main as audit_main
from golf_nb.config import change
from golf_nb.console import REMEDIES
from golf_nb.presets import get
from golf_nb.runs import RunError
from golf_nb.study.grid import main as grid_main
from golf_nb.study.grid import toy_text, train_net

ROOT = Path(__file__).parent.parent
SMALL = {
    'steps': 2, 'model.dim': 32, 'model.hidden': 64, 'model.vocab': 384, 'model.bigram.buckets': 64,
    'quant.min_numel': 1000, 'data.seq_len': 32, 'data.batch_tokens': 64, 'eval.window': 128,
    'eval.stride': 32, 'eval.batch': 8, 'log_every': 1, 'compile': False, 'checkpoint_seconds': 60.,
}
GRID = {'set': SMALL | {'steps': 400, 'data.source': 'text'}, 'seeds': [1],
        'arms': {'one': {'model.schedule': {'order': '0 1 2'}}}}
REPORT = {
    'parameters': 10, 'bpb': {'pre_quant': 1.3, 'post_quant': 1.2, 'sliding': 1.15}, 'rivals': {},
    'artifact': {'total': 90, 'parts': {}},
    'scored': {'window': 512, 'stride': 64, 'tokens': 5, 'seconds': 1.},
    'cost': {'steps': 3, 'tokens': 9, 'train_seconds': 1., 'tokens_per_second': 9., 'peak_mib': 100.},
}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A folder with a text, a finished run of it that was scored, a grid, and the mere record of a run."
    place = tmp_path_factory.mktemp('finished')
    text = toy_text(place/'text')
    train_net(change(get('tiny'), **SMALL | {'data.source': str(text)}), place/'run')
    (place/'run'/'scores.json').write_text(json.dumps(evaluate.score_run(place/'run')))
    (place/'g.json').write_text(json.dumps(GRID))
    (place/'told').mkdir()
    (place/'told'/'config.json').write_text('{}')
    (place/'told'/'report.json').write_text(json.dumps(REPORT))
    return place


@pytest.fixture
def place(finished, tmp_path):
    "A copy of it, to be spoiled; its data is that of the original."
    shutil.copytree(finished, tmp_path/'here')
    return tmp_path/'here'


@contextmanager
def started(place, *words, **options):
    "A command that has got as far as hearing signals; what is left of it at the end is killed."
    command = [sys.executable, '-m', *map(str, words)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)} | options.pop('env', {})
    with subprocess.Popen(command, cwd=place, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, **options) as process:
        try: yield process
        finally: process.kill()


def hears(process):
    "Has the process a handler for SIGTERM of its own?"
    try: status = Path(f'/proc/{process.pid}/status').read_text()
    except OSError: return True                            # it has ended
    caught = int(status.split('SigCgt:')[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def left_in(place):
    "Processes that work in a folder."
    found = []
    for path in Path('/proc').glob('[0-9]*'):
        try:
            state = (path/'stat').read_text().rpartition(')')[2].split()[0]
            if (path/'cwd').resolve() == place and state != 'Z':
                found.append((path/'cmdline').read_text())
        except OSError: pass
    return found


def ends_well(process, number, place):
    "Whether a command that got a signal said one line, and left nothing half-done and no process behind."
    said, complained = process.communicate(timeout=60)
    told = [line for line in complained.splitlines() if line.startswith('interrupted: ')]
    assert 'Traceback' not in said + complained, complained
    if process.returncode in (0, 1, 2) and not told: return ''        # it had ended before
    assert process.returncode == 128 + number and len(told) == 1, (process.returncode, complained)
    for _ in range(100):
        if not (left := left_in(place)): break
        time.sleep(0.05)
    assert not left
    assert not list(place.rglob('*.tmp'))
    for path in place.rglob('*.json'): json.loads(path.read_text())
    return told[0]


def wait_for(stream, words):
    "Read a stream until a line holds some words."
    for line in stream:
        if words in line: return
    raise AssertionError(f'never said: {words}')


def test_a_stop_while_torch_is_imported(place):
    with started(place, 'golf_nb.evaluate', 'run') as process:
        while not hears(process): time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert ends_well(process, signal.SIGINT, place) == 'interrupted: nothing was changed'


def test_a_stop_while_a_text_is_scored(place):
    before = (place/'run'/'scores.json').read_bytes()
    config = json.loads((place/'run'/'config.json').read_text())
    config['eval']['stride'] = 1                                      # takes minutes
    (place/'run'/'config.json').write_text(json.dumps(config))
    with started(place, 'golf_nb.evaluate', 'run') as process:
        wait_for(process.stdout, 'scoring, sliding window ...')
        process.send_signal(signal.SIGTERM)
        assert 'run is as it was; run the same command again' in ends_well(process, signal.SIGTERM, place)
    assert (place/'run'/'scores.json').read_bytes() == before


def test_a_stop_while_a_predictor_is_probed(place):
    with started(place, 'golf_nb.audit', 'run') as process:
        wait_for(process.stderr, 'probing ...')
        while len(left_in(place)) < 2: time.sleep(0.01)               # the predictor has a process of its own
        process.send_signal(signal.SIGINT)
        assert 'nothing was written' in ends_well(process, signal.SIGINT, place)
    assert not (place/'run'/'audit.json').exists()


COMMANDS = {
    'evaluate': ('golf_nb.evaluate', 'run'),
    'ttt': ('golf_nb.ttt', 'run', '--update', 'sgd', '--chunk', '256', '--json'),
    'report': ('golf_nb.report', 'told', 'told'),
    'audit': ('golf_nb.audit', 'run'),
    'grid': ('golf_nb.study.grid', 'g.json', '--workers', '2'),
    'grid here': ('golf_nb.study.grid', 'g.json', '--workers', '0'),
    'findings': ('golf_nb.study.findings', '--grids', ROOT/'nbs'/'experiments', '--results', 'results'),
    'interop': ('golf_nb.interop', 'check', ROOT/'tests'/'vectors'),
}


@pytest.fixture(scope='module')
def lengths(finished, tmp_path_factory):
    "How many seconds each command takes; no more than 20 are looked at."
    place, found = tmp_path_factory.mktemp('lengths')/'here', {}
    for name, words in COMMANDS.items():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(finished, place)
        shutil.copytree(ROOT/'results', place/'results')
        begin = time.monotonic()
        with started(place, *words) as process:
            try: process.communicate(timeout=20)
            except subprocess.TimeoutExpired: process.terminate()
        found[name] = time.monotonic() - begin
    return found


@pytest.mark.long
@pytest.mark.parametrize('seed', range(20))
def test_a_stop_at_any_moment(place, lengths, seed):
    chance = random.Random(seed)
    name, number = list(COMMANDS)[seed % len(COMMANDS)], chance.choice([signal.SIGINT, signal.SIGTERM])
    shutil.copytree(ROOT/'results', place/'results')
    with started(place, *COMMANDS[name]) as process:
        while not hears(process): time.sleep(0.002)
        time.sleep(chance.random()*lengths[name])
        process.send_signal(number)
        ends_well(process, number, place)


# --- disks --------------------------------------------------------------------------------------------------

def test_a_full_disk_costs_no_scores(place):
    before = (place/'run'/'scores.json').read_bytes()
    def full(): resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with started(place, 'golf_nb.evaluate', 'run', '--json', '--quiet', preexec_fn=full) as process:
        said, complained = process.communicate()
    assert process.returncode == 1 and json.loads(said)['window'] == 128
    assert complained.splitlines() == [f'error: the scores are not kept: run/scores.json: '
                                       f'{os.strerror(errno.EFBIG)}: {REMEDIES[errno.EFBIG]}']
    assert (place/'run'/'scores.json').read_bytes() == before


@pytest.mark.parametrize('as_json', [True, False])
def test_a_folder_that_cannot_be_written_costs_no_scores(as_json, finished, tmp_path, capsys):
    scores = json.loads((finished/'run'/'scores.json').read_text())
    locked = tmp_path/'locked'
    locked.mkdir(mode=0o555)
    if not os.access(locked, os.W_OK): folder = locked
    else: folder = Path('/proc')                           # an administrator may write anywhere else
    with pytest.raises(evaluate.ScoringError, match=f'the scores are not kept: {folder}/scores.json: '):
        evaluate.conclude(folder, scores, as_json)
    said = capsys.readouterr().out
    assert json.loads(said) == scores if as_json else f'{scores["sliding"]:.4f}' in said


def test_an_audit_that_cannot_be_written_is_printed(place, capsys):
    (place/'run'/'audit.json').mkdir()
    with pytest.raises(SystemExit) as end: audit_main([str(place/'run'), '--no-protocol', '--quiet'])
    said, complained = capsys.readouterr()
    assert end.value.code == 2 and 'C4 coverage' in said
    assert complained.startswith(f'error: the report is not kept: {place/"run"/"audit.json"}: Is a')
    assert complained.count('\n') == 1


# --- readers ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('environment', [
    {'PYTHONIOENCODING': 'cp1252'}, {'PYTHONUTF8': '0', 'PYTHONIOENCODING': 'ascii'}])
def test_a_console_without_our_characters_gets_others(place, environment):
    for name in ('lauf \u2192 \u03b1', 'zwei'): shutil.copytree(place/'told', place/name)
    with started(place, 'golf_nb.report', 'zwei', 'lauf \u2192 \u03b1', env=environment) as process:
        said, complained = process.communicate()
    assert (process.returncode, complained) == (0, '')
    assert said.splitlines()[0].split() == ['zwei', 'lauf', '->', '?']
    with started(place, 'golf_nb.report', 'none \u2192', env=environment) as process:
        _, complained = process.communicate()
    assert complained.startswith('error: none ->: no such folder') and complained.count('\n') == 1


def test_a_reader_that_has_gone_is_no_error(place):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, '-m', 'golf_nb.report', 'told']
    done = subprocess.run(command, cwd=place, env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=writing,
                          stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, '')


# --- other data, other places -------------------------------------------------------------------------------

def test_a_refused_command_leaves_the_scores_alone(place, capsys):
    before = (place/'run'/'scores.json').read_bytes()
    document = next((place/'text').iterdir())
    document.write_text(document.read_text().replace(' the ', ' a ', 1))
    with pytest.raises(RunError, match='corpus'):
        evaluate.main([str(place/'run'), '--source', str(place/'text')])
    assert (place/'run'/'scores.json').read_bytes() == before
    assert 'bits per byte' not in capsys.readouterr().out


def test_a_text_that_was_moved_is_found(place, capsys):
    (place/'text').rename(place/'elsewhere')
    before = json.loads((place/'run'/'scores.json').read_text())
    assert evaluate.main([str(place/'run'), '--source', str(place/'elsewhere'), '--quiet', '--json']) == 0
    again = json.loads(capsys.readouterr().out)
    assert again['sliding'] == before['sliding']
    assert json.loads((place/'run'/'scores.json').read_text()) == again


def test_scored_again_a_run_passes_its_audit(place, capsys):
    "Clocks differ, scores do not."
    scored = json.loads((place/'run'/'scores.json').read_text())
    report = json.loads((place/'run'/'report.json').read_text())
    (place/'run'/'report.json').write_text(json.dumps(report | {'scored': scored}))
    evaluate.main([str(place/'run'), '--quiet'])
    assert json.loads((place/'run'/'scores.json').read_text())['seconds'] != scored['seconds']
    assert audit.folders.audit_run(place/'run', protocol=False).failing() == []
    capsys.readouterr()


def test_quiet_is_quiet(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    grid = GRID | {'set': GRID['set'] | {'steps': 2}}
    (place/'g.json').write_text(json.dumps(grid))
    assert grid_main(['g.json', '--workers', '0', '--quiet']) == 0
    assert capsys.readouterr() == ('', '')
