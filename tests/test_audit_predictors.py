"The auditor against predictors: a zoo of cheats and honest ones, what it can see, and what it cannot."
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from reading import one_now
from zoo import tricks
from zoo.cheats import CHEATS
from zoo.honest import HONEST, OTHERS, ROUNDING, Bounded, Counter, Pool, Sliding, Uniform

from golf_nb.audit import holdings
from golf_nb.audit.isolation import Party, import_predictor, make_predictor
from golf_nb.audit.protocol import audit
from golf_nb.audit.stream import AuditError, Stream

ZOO = Path(__file__).parent/'zoo'
EXPECTED = json.loads((ZOO/'expected.json').read_text())
SEEDS = one_now((0, 1, 2), 0)
BYTES = np.ones(32, np.int64)


def text(seed, length=170, vocab=32):
    "A random text in which some words follow others; token 0 begins a document."
    rng = np.random.default_rng(seed)
    likely, tokens = rng.integers(1, vocab, (vocab, 2)), [0]
    while len(tokens) < length: tokens.append(int(rng.choice([*likely[tokens[-1]], rng.integers(vocab)])))
    return np.array(tokens)


def judged(given, seed=0, tokens=None, **options):
    "Audit a predictor on a small text; the auditor gets no name."
    return audit(given, Stream(text(seed) if tokens is None else tokens, BYTES), seed=seed, **options)


def verdicts(report): return {row.check: row.verdict for row in report.rows}


def named(given): return getattr(given, '__name__', type(given).__name__)


# --- the zoo ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', one_now(CHEATS, 'hashed cache keyed by the target'))
def test_a_cheat_of_the_contest_is_caught(name, seed):
    report = judged(lambda: CHEATS[name](), seed)
    assert EXPECTED[name] in report.failing(), str(report)
    assert report.exit_code == 1


TRICKS_NOW = [tricks.ReadsInCompiledCode, tricks.SharesAnOldArray, tricks.TextInATuple, tricks.FailsInCopies]


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('kind', one_now(tricks.CAUGHT, *TRICKS_NOW), ids=named)
def test_a_trick_is_caught(kind, seed, monkeypatch):
    words = text(seed)
    monkeypatch.setattr(tricks, 'PLACE', {'words': words.tolist(), 'tuple': tuple(words.tolist()),
                                          'bytes': bytes(words.tolist())})
    report = judged(kind, seed)
    assert tricks.CAUGHT[kind] in report.failing(), str(report)


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('kind', one_now(tricks.FITTED, tricks.RelativeHalf), ids=named)
def test_what_was_made_from_the_text_is_caught(kind, seed):
    report = judged(kind(text(seed)), seed)
    assert tricks.FITTED[kind] in report.failing(), str(report)


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', one_now(HONEST, 'score-first SGD'))
def test_an_honest_predictor_of_the_contest_is_clean(name, seed):
    report = judged(HONEST[name](), seed)
    assert report.word == 'found nothing' and report.exit_code == 0, str(report)


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('given', one_now(OTHERS, Bounded, Pool), ids=named)
def test_another_honest_predictor_is_clean(given, seed):
    report = judged(given, seed)
    assert report.verdict == 'pass', str(report)


@pytest.mark.parametrize('given', ROUNDING, ids=named)
def test_rounding_is_undecided_and_its_size_is_said(given):
    report = judged(given)
    undecided = [row for row in report.rows if row.verdict == 'undecided']
    assert report.failing() == [] and {row.check for row in undecided} >= {'C1 future flip'}, str(report)
    assert all('nats, which may be rounding' in row.evidence for row in undecided), str(report)


# --- one claim each --------------------------------------------------------------------------------------

class Holds(Counter):
    def __init__(self, what): self.what = what


def hidden_in_a_closure():
    "Holds the text where only a function can see it."
    hidden = text(0).astype(np.uint16).tobytes()
    class Inside(Counter):
        def reveal(self, lo, tokens): return len(hidden)
    return Inside()


def maker_with_the_text():
    "A function that makes a predictor, and has the text in its closure."
    words = text(0)
    return lambda: Holds(words[20:])


HOLDERS = {
    'closure': hidden_in_a_closure,
    'stream': lambda: Holds(Stream(text(0), BYTES)),
    'list of tensors': lambda: Holds({'a': [torch.tensor(text(0))]}),
    'numbers': lambda: Holds(tuple(text(0).tolist())),
    'made later': maker_with_the_text,
}


@pytest.mark.parametrize('place', HOLDERS)
def test_a_copy_of_the_text_is_found_wherever_it_is(place):
    stream = Stream(text(0), BYTES)
    with Party(HOLDERS[place]()) as party: assert party.search(stream)[0]
    with Party(Counter) as party: assert party.search(stream) == ('', '')


@pytest.mark.long
def test_a_copy_of_the_text_is_found_in_an_artifact():
    assert 'C1 read guard' in judged(Counter, artifact=text(0).astype(np.uint8).tobytes()).failing()


@pytest.mark.long
@pytest.mark.parametrize('line, check', [
    ('TEXT = np.fromfile(PATH, np.uint8)', 'C1 isolation'), ('TEXT = {words}', 'C1 read guard'),
    ('TEXT = subprocess.run(["cat", PATH], capture_output=True)', 'C1 isolation')])
def test_a_module_is_watched_while_it_is_imported(line, check, tmp_path):
    text(0).astype(np.uint8).tofile(tmp_path/'val.bin')
    source = f'''import subprocess
import numpy as np
from zoo.honest import Counter
PATH = {str(tmp_path/"val.bin")!r}
try: {line.format(words=text(0).tolist())}
except OSError: TEXT = None
class Knows(Counter):
    def reveal(self, lo, tokens): return TEXT
'''
    (tmp_path/'knowing.py').write_text(source)
    assert check in judged(f'{tmp_path/"knowing.py"}:Knows').failing()


def test_the_stream_is_empty_where_the_predictor_lives():
    words = text(0)
    stream = Stream(words, BYTES)

    class Greedy(Counter):
        def start(self, *facts):
            super().start(*facts)
            for place in (stream._tokens, words): self.counts[0, 1] += int((place == text(0)).mean() > .5)
            try: stream.read(0, 20)
            except AuditError: pass
    report = audit(Greedy, stream, seed=0)
    assert set(report.failing()) == {'C1 read guard'}
    assert report.facts['bpb'] == audit(Counter, stream, seed=0).facts['bpb']
    # here nothing was replaced
    assert (words == text(0)).all() and (stream._tokens == text(0)).all()


class Fitted(Counter):
    "Was fitted to a text when it was made."
    def __init__(self, tokens):
        super().start(None, 32, 0)
        self.reveal(0, tokens)
        self.known = self.counts
    def start(self, *facts):
        super().start(*facts)
        self.counts = self.known.copy()


@pytest.mark.long
def test_what_was_fitted_before_is_undecided_without_log_and_code():
    report = judged(Fitted(text(0)))
    assert report.exit_code == 2 and report.failing() == []
    assert 'C1 provenance' in [row.check for row in report.rows if row.verdict == 'undecided']
    assert judged(Fitted(text(0)), explained='its log is in train.log').exit_code == 0


@pytest.mark.long
@pytest.mark.parametrize('trick', ['rewrites', 'remembers'])
def test_some_cheats_gain_nothing(trick):
    "Rows are copied when they are committed, and no run can leave anything for the next."
    class Tries(Counter):
        memory: list = []
        def score(self, lo, hi, inputs):
            self.rows = super().score(lo, hi, inputs)
            if trick == 'remembers' and len(self.memory) > hi:
                self.rows[:] = np.log(np.eye(32)[self.memory[lo:hi]] + 1e-9)
            return self.rows
        def reveal(self, lo, tokens):
            super().reveal(lo, tokens)
            if trick == 'rewrites': self.rows[np.arange(len(tokens)), tokens] = 0.
            if trick == 'remembers': Tries.memory.extend(map(int, tokens))
    report = judged(Tries)
    assert report.facts['bpb'] == judged(Counter).facts['bpb'] and Tries.memory == []


@pytest.mark.long
def test_libraries_may_be_imported_late():
    "An optimizer of torch imports much when it is first made; here, in a program that has not done so."
    program = """import numpy as np
from test_audit_predictors import BYTES, Stream, audit, text
from zoo.honest import Module
import sys
assert 'torch._dynamo' not in sys.modules
report = audit(Module, Stream(text(0, 40), BYTES))
assert report.verdict == 'pass', str(report)"""
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ZOO.parent), str(ZOO.parent.parent)])}
    done = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr


class Once(Counter):
    "Answers once for each chunk."
    told = True
    def score(self, lo, hi, inputs):
        assert self.told
        self.told = False
        return super().score(lo, hi, inputs)
    def reveal(self, lo, tokens):
        self.told = True
        super().reveal(lo, tokens)


class OneByOne(Counter):
    "Wants chunks of one position."
    def boundaries(self, n_tokens): return range(1, n_tokens)


@pytest.mark.long
@pytest.mark.parametrize('given', [Once, OneByOne])
def test_an_honest_predictor_that_cannot_be_asked_much_passes(given):
    report = judged(given, tokens=text(0, 40))
    assert report.verdict == 'pass', str(report)


@pytest.mark.long
def test_what_is_not_answered_anywhere_is_undecided():
    class Refuses(Counter):
        "Answers only for the text that it expects, in whatever process."
        def score(self, lo, hi, inputs):
            if (np.asarray(inputs) != text(0, 60)[:len(inputs)]).any(): raise ValueError('not that')
            return super().score(lo, hi, inputs)
    found = verdicts(judged(Refuses, tokens=text(0, 60)))
    assert {found[f'C1 {kind} flip'] for kind in ('future', 'target')} <= {'undecided', 'fail'}, found


def test_an_artifact_may_be_read(tmp_path):
    class FromFile(Counter):
        def start(self, artifact, vocab, n_tokens):
            super().start(artifact, vocab, n_tokens)
            self.counts = self.counts + np.load(artifact)['prior']
    path = tmp_path/'model.npz'
    np.savez(path, prior=np.full((33, 32), .1))
    assert judged(FromFile, tokens=text(0, 40), artifact=path).verdict == 'pass'


@pytest.mark.long
def test_an_artifact_may_be_bytes_or_a_file_for_compiled_code(tmp_path):
    from safetensors.torch import load_file, save_file
    class FromBytes(Counter):
        def start(self, artifact, vocab, n_tokens):
            super().start(artifact, vocab, n_tokens)
            self.counts = self.counts + np.frombuffer(artifact, np.float64)
    class FromTensors(Counter):
        def start(self, artifact, vocab, n_tokens):
            super().start(artifact, vocab, n_tokens)
            self.counts = self.counts + load_file(artifact)['prior'].numpy()
    assert judged(FromBytes, artifact=np.full(32, .1).tobytes()).verdict == 'pass'
    save_file({'prior': torch.full((33, 32), .1)}, tmp_path/'model.safetensors')
    assert judged(FromTensors, artifact=tmp_path/'model.safetensors').verdict == 'pass'


@pytest.mark.parametrize('length, vocab', one_now([(3, 32), (9, 32), (60, 2), (90, 900)], (9, 32)))
def test_streams_of_any_size(length, vocab):
    tokens = np.random.default_rng(0).integers(0, vocab, length)
    for kind in (Uniform, Counter)[length < 10:]:
        report = audit(kind, Stream(tokens, np.ones(vocab, np.int64)), seed=0)
        assert report.failing() == [] and (length < 9 or report.verdict == 'pass'), str(report)
    if length > 9: assert audit(tricks.Peeks, Stream(tokens, np.ones(vocab, np.int64))).verdict == 'fail'


# --- how a predictor is given, and things that go wrong ---------------------------------------------------

def test_a_predictor_is_made_from_whatever_is_given():
    assert isinstance(make_predictor(Counter), Counter) and isinstance(make_predictor(lambda: Counter()),
                                                                       Counter)
    one = Counter()
    assert make_predictor(one) is one
    for bad in (3, lambda: 3, object()):
        with pytest.raises(AuditError): make_predictor(bad)
    with pytest.raises(AuditError): import_predictor('no_such_module:thing')


@pytest.mark.parametrize('name, source, says', [
    ('no_such_module:Thing', '', 'ModuleNotFoundError'), ('bad.py:Missing', 'x = 1', 'AttributeError'),
    ('bad.py:Bad', 'import nowhere', 'ModuleNotFoundError'), ('bad.py:Bad', 'def (', 'SyntaxError'),
    ('bad.py:Bad', 'raise SystemExit(3)', 'SystemExit')])
def test_what_cannot_be_imported_is_one_line(name, source, says, tmp_path):
    (tmp_path/'bad.py').write_text(source)
    with pytest.raises(AuditError) as caught: Party(name.replace('bad.py', str(tmp_path/'bad.py')))
    line = str(caught.value)
    assert says in line and '\n' not in line and 'cannot be imported' in line


def test_a_file_finds_its_neighbours(tmp_path):
    (tmp_path/'weights.txt').write_text('3')
    (tmp_path/'neighbour_of_it.py').write_text('from zoo.honest import Uniform as Given')
    (tmp_path/'lone.py').write_text('from neighbour_of_it import Given\nclass Mine(Given): pass')
    report = judged(f'{tmp_path/"lone.py"}:Mine', tokens=text(0, 40))
    assert report.verdict == 'pass', str(report)


def test_a_predictor_that_does_not_answer_is_undecided():
    class Sleeps(Counter):
        def score(self, lo, hi, inputs):
            if lo > 60: time.sleep(1e6)       # an auditor who waits for it never ends
            return super().score(lo, hi, inputs)
    report = judged(Sleeps, seconds=2.)
    assert report.exit_code in (1, 2) and report.verdict != 'pass'
    assert verdicts(report)['C4 each position once'] == 'undecided'


def test_threads_begun_before_the_audit_end_it_in_seconds():
    given = Pool()
    given.pool = ThreadPoolExecutor(1)
    given.pool.submit(int).result()            # now there is a worker, here and not where it will be asked
    given.start = lambda *facts: Counter.start(given, *facts)
    begin = time.monotonic()
    report = judged(given)
    assert time.monotonic() - begin < 60 and report.exit_code == 2, str(report)
    assert 'give the class' in str(report)
    given.pool.shutdown()


def children():
    "The processes that this one has begun and not yet buried."
    return {pid for file in Path('/proc/self/task').glob('*/children') for pid in file.read_text().split()}


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='children are listed in /proc')
def test_nothing_is_left_behind():
    def ends(): return len(os.listdir('/proc/self/fd'))
    threads, processes, files = threading.active_count(), children(), ends()
    with Party(Uniform) as party: party.begin()
    assert threading.active_count() == threads and children() == processes and ends() == files


def test_a_report_says_what_protected_it_and_what_it_did_not_search():
    report = judged(Uniform, tokens=text(0, 40))
    notes = '\n'.join(report.notes)
    assert 'protected by the kernel' in notes and 'missing here' in notes
    assert f'seed {report.facts["seed"]}' in notes
    assert notes.count('not searched') > 3 and report.word == 'found nothing'
    assert report.as_dict()['verdict'] == 'pass' and report.as_dict()['notes'] == report.notes


def test_without_the_kernel_the_guard_remains(monkeypatch):
    monkeypatch.setattr(holdings, '_call', lambda *_: -1)
    monkeypatch.setattr(holdings, '_leave_network', lambda: False)
    report = judged(tricks.Opens, tokens=text(0, 40))
    assert report.failing() == ['C1 isolation'], str(report)
    assert 'missing here: network, files, system calls' in str(report)


@pytest.mark.long
def test_audits_side_by_side():
    "Each has its own processes, and its own end of the kernel's filter."
    with ThreadPoolExecutor(2) as pool:
        honest, cheat = pool.map(lambda kind: judged(kind, tokens=text(0, 40)), [Sliding, tricks.MakesNodes])
    assert honest.verdict == 'pass' and 'C1 isolation' in cheat.failing(), f'{honest}\n{cheat}'
