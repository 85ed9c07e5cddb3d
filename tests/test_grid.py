"Grids as they are really used: workers, kill -9, resume, failures, shares."
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from golf_nb.study.grid import STOPPED, jobs_of, main, read_records, state_of, steps_done, toy_text

ROOT = Path(__file__).parent.parent
GRIDS = sorted((ROOT/'nbs'/'experiments').glob('e[0-9][0-9]*.json'))
GRID = [sys.executable, '-m', 'golf_nb.study.grid']
SMALL = {
    'steps': 2, 'model.dim': 32, 'model.hidden': 64, 'model.vocab': 384, 'model.bigram.buckets': 64,
    'quant.min_numel': 1000, 'data.seq_len': 32, 'data.batch_tokens': 64, 'eval.window': 32, 'log_every': 1,
    'compile': False, 'data.source': 'text', 'checkpoint_seconds': 0.,
}
ARMS = {'one': {'model.schedule': {'order': '0 1 2'}}, 'two': {'model.schedule': {'order': '0 1x2 2'}}}


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a small text, where a grid can run."
    toy_text(tmp_path/'text')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    return tmp_path


def write(folder, **values):
    "Write the grid g.json."
    (folder/'g.json').write_text(json.dumps({'set': SMALL, 'arms': ARMS, 'seeds': [1]} | values))
    return folder/'g.json'


def grid(*words, code=0):
    "Run the command in a process of its own; what it printed."
    done = subprocess.run([*GRID, 'g.json', *map(str, words)], capture_output=True, text=True)
    assert done.returncode == code and 'Traceback' not in done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def grid_here(capsys):
    "Run the command without workers, in this process; what it printed."
    def run(*words):
        assert main(['g.json', '--workers', '0', *words]) == 0
        return capsys.readouterr().out
    return run


def wait_for(condition, process):
    "Wait until something is so, or the process has ended."
    while process.poll() is None and not condition(): time.sleep(0.02)


def test_help_and_list_do_without_torch(here):
    write(here)
    code = ('import sys, golf_nb.study.grid as g; g.main(["g.json", "--list"]); '
            'sys.exit("torch" in sys.modules)')
    done = subprocess.run([*GRID[:1], '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['g', 'one-1', 'new', 'g', 'two-1', 'new']


def test_killed_grid_goes_on_from_its_checkpoint(here):
    "Its worker (`follow_parent`) ends with it; the same command goes on, and repeats nothing finished."
    for steps in (100, 1000, 10_000):     # a busy machine may let a run end before it is killed
        jobs = jobs_of(write(here, arms=ARMS | {'two': ARMS['two'] | {'steps': steps}}))
        half_done = jobs[1].folder/'checkpoint'/'latest.safetensors'
        with subprocess.Popen([*GRID, 'g.json', '--workers', '1'], stdout=subprocess.DEVNULL) as parent:
            try: wait_for(half_done.exists, parent)
            finally: parent.kill()
        if state_of(jobs[1]) == 'begun': break
    assert [state_of(job) for job in jobs] == ['done', 'begun']
    first = jobs[0].record.stat().st_mtime_ns
    assert '2 runs, 1 to do' in grid('--workers', 1)
    assert 'continuing at step' in (jobs[1].folder/'worker.txt').read_text()
    assert [state_of(job) for job in jobs] == ['done']*2 and jobs[0].record.stat().st_mtime_ns == first
    curve = json.loads(jobs[1].record.read_text())['curve']
    assert steps > 100 or [step for step, _ in curve] == list(range(2, 101, 2))
    assert '0 to do' in grid()


def test_nets_that_are_trained_are_only_measured(here, grid_here):
    jobs = jobs_of(write(here))
    grid_here()
    trained = [(job.folder/'model.golf').stat().st_mtime_ns for job in jobs]
    for job in jobs: job.record.unlink()
    assert 'left' in grid('--workers', 1) and [state_of(job) for job in jobs] == ['done']*2
    assert trained == [(job.folder/'model.golf').stat().st_mtime_ns for job in jobs]


def test_a_measurement_is_known_by_its_function(here, monkeypatch):
    "A renamed module costs no measurement; other options cost one, which replaces the old."
    for module, found in (('before', 1), ('now', 2)):
        (here/f'{module}.py').write_text(f'def measure(folder, rows): return {{"found": {found}}}\n')
    monkeypatch.syspath_prepend(here)
    runs = ('before', 4, 1, 'before'), ('now', 4, 1, 'before'), ('now', 5, 2, 'now')
    for module, rows, found, named in runs:
        job, = jobs_of(write(here, arms={'one': ARMS['one']}, after={f'{module}:measure': {'rows': rows}}))
        assert main(['g.json', '--workers', '0']) == 0
        record = json.loads(job.record.read_text())
        assert record['measured'] == {'measure': {'found': found}} and state_of(job) == 'done'
        assert record['options'] == {f'{named}:measure': {'rows': rows}}


@pytest.mark.parametrize('path', GRIDS, ids=lambda path: path.stem)
def test_no_record_is_to_be_made_again(path):
    "All that lies in results/ belongs to its grid as it is today, and holds all that the grid measures."
    jobs = [job for job in jobs_of(path, results=ROOT/'results') if job.record.exists()]
    assert {state_of(job) for job in jobs} == {'done'}
    assert {job.record for job in jobs} == set((ROOT/'results'/path.stem).glob('*.json'))


def test_again_trains_anew_and_keeps_the_old_record(here, grid_here):
    job, other = jobs_of(write(here))
    grid_here()
    model, record = (job.folder/'model.golf').read_bytes(), job.record.read_bytes()
    for path in (job.folder/'model.golf', other.record): path.write_bytes(b'marked')
    job.record.write_text(json.dumps(json.loads(record) | {'mark': True}))
    assert '1 runs, 1 to do' in grid_here('--again', '--only', 'one-*')
    assert (job.folder/'model.golf').read_bytes() == model
    assert 'mark' not in json.loads(job.record.read_text())
    assert json.loads((here/'runs'/'before'/'g'/'one-1.json').read_text())['mark']
    assert other.record.read_bytes() == b'marked'               # of a run that was not asked for


def test_asked_to_stop_it_saves(here):
    jobs = jobs_of(write(here, set=SMALL | {'steps': 10_000, 'checkpoint_seconds': 60.}))[:1]
    pipes = dict.fromkeys(('stdout', 'stderr'), subprocess.PIPE)
    with subprocess.Popen([*GRID, 'g.json', '--workers', '1'], **pipes) as parent:
        wait_for(lambda: steps_done(jobs[0]) > 0, parent)
        parent.send_signal(signal.SIGTERM)
        _, said = parent.communicate()
    assert b'run the same command to continue' in said and b'Traceback' not in said
    assert state_of(jobs[0]) == 'begun' and (jobs[0].folder/'checkpoint'/'latest.safetensors').exists()


def test_a_failing_run_is_recorded_and_the_rest_goes_on(here, monkeypatch, capsys):
    (here/'broken.py').write_text('def measure(folder): raise ValueError("cannot\\nmeasure")\n')
    monkeypatch.syspath_prepend(here)
    write(here, after={'broken:measure': {}}, arms=ARMS | {'bad': {'data.source': 'nowhere'}})
    assert main(['g.json', '--workers', '0']) == 1
    said = capsys.readouterr().out
    assert 'one-1: FAILED: ValueError: cannot measure' in said and 'bad-1: FAILED: DataError' in said
    assert read_records(Path('results/g')) == []
    (here/'broken.py').write_text('def measure(folder): return {"files": len(list(folder.iterdir()))}\n')
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    del sys.modules['broken']
    importlib.invalidate_caches()
    assert main(['g.json', '--workers', '0']) == 0              # failures are not repeated by themselves
    assert 'failed before' in capsys.readouterr().out
    assert main(['g.json', '--workers', '0', '--retry', '--only', '[ot]*']) == 0
    records = read_records(Path('results/g'))
    assert [record['measured']['measure']['files'] > 3 for record in records] == [True]*2


def test_two_shares_do_disjoint_work(here, grid_here, monkeypatch):
    jobs = jobs_of(write(here))
    grid_here('--share', '0/2')
    assert [state_of(job) for job in jobs] == ['done', 'new']
    monkeypatch.setenv('RANK', '1')                        # as torchrun does
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert '1 runs, 1 to do' in grid('--workers', 1)
    assert [state_of(job) for job in jobs] == ['done']*2


@pytest.mark.parametrize('words, message', [
    (['none.json'], 'No such file'),
    (['g.json', '--share', '2/2'], '--share'),
    (['g.json', '--share', 'x'], '--share'),
])
def test_mistakes_are_one_line(here, words, message):
    write(here)
    done = subprocess.run([*GRID, *words], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert done.stderr.startswith('error: ') and not {0, 1} & set(STOPPED)
