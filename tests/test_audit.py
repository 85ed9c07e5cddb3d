"The auditor against a zoo of cheats that happened, against others, and against honest predictors."
import collections
import ctypes
import importlib.metadata
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from reading import one_now
from zoo import folders
from zoo.cheats import CHEATS
from zoo.honest import HONEST, Counter, ScoreFirst, Sliding, Tiny, Uniform, log_softmax

import golf_nb
from golf_nb.audit.command import main
from golf_nb.audit.folders import audit_folder, audit_run, audit_seeds, ledger_row
from golf_nb.audit.isolation import import_predictor, make_predictor
from golf_nb.audit.protocol import audit
from golf_nb.audit.stream import AuditError, Stream
from golf_nb.config import TTTConfig
from golf_nb.files import locked
from golf_nb.ttt import score_run

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


# --- the zoo ---------------------------------------------------------------------------------------------

def test_the_zoo_is_complete():
    assert len(EXPECTED) == 16 and len(HONEST) == 8
    assert EXPECTED.keys() == CHEATS.keys() | folders.RUNS.keys() | folders.SOURCES.keys()


def test_the_auditor_does_not_know_the_zoo():
    package = Path(golf_nb.__file__).parent
    content = ' '.join(path.read_text() for path in (package/'audit').glob('*.py'))
    names = [*EXPECTED, *(kind.__name__ for kind in CHEATS.values()), 'zoo', 'tests/']
    assert len(content) > 50_000 and [name for name in names if name in content] == []


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', CHEATS)
def test_a_cheating_predictor_is_caught(name, seed):
    report = judged(lambda: CHEATS[name](), seed)
    assert EXPECTED[name] in report.failing(), str(report)
    assert report.exit_code == 1


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', HONEST)
def test_an_honest_predictor_passes(name, seed):
    report = judged(HONEST[name](), seed)
    assert report.verdict == 'pass' and report.exit_code == 0, str(report)


WORDS = 'the state of the union is strong and the people of these states are at peace with all'.split()


@pytest.fixture(scope='session')
def sound_run(tmp_path_factory):
    "A finished run on a small corpus of its own; processes that test side by side share it."
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'sound-run'
    with locked(place.with_suffix('.lock')):
        if not (place/'out'/'report.json').exists(): train_sound_run(place)
    return place


def train_sound_run(place):
    "Train it, in processes of its own."
    place.mkdir()
    rng = np.random.default_rng(0)
    (place/'texts').mkdir()
    for number in range(20):
        words = ' '.join(rng.choice(WORDS, 300)) + f' No. {number}, caf\u00e9 \u2603.'
        (place/'texts'/f'{number:02}.txt').write_text(words)
    small = '''--model.dim 64 --model.hidden 64 --model.vocab 320 --quant.min-numel 2048 --no-compile
        --precision fp32 --data.seq-len 64 --data.batch-tokens 512 --eval.window 64 --eval.stride 32
        --log-every 1 --steps 4'''.split()
    command = [sys.executable, '-m', 'golf_nb.train', *small, '--data.source', str(place/'texts'), '--out',
               str(place/'out')]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'XDG_CACHE_HOME': str(place/'cache')}
    subprocess.run(command, env=environment, check=True, capture_output=True)


@pytest.fixture
def run_copy(sound_run, tmp_path, monkeypatch):
    "A copy of the run, to be changed."
    monkeypatch.setenv('XDG_CACHE_HOME', str(sound_run/'cache'))
    shutil.copytree(sound_run/'out', tmp_path/'out')
    return tmp_path/'out'


def test_a_sound_run_passes(run_copy, capsys):
    assert main([str(run_copy)]) == 0
    table = json.loads((run_copy/'audit.json').read_text())
    assert table['verdict'] == 'pass' and len(table['rows']) > 20
    assert 'C2 rows' in capsys.readouterr().out


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', folders.RUNS)
def test_a_run_that_is_none_is_caught(name, seed, run_copy):
    folders.RUNS[name](run_copy, seed)
    report = audit_folder(run_copy, protocol=False)
    assert EXPECTED[name] in report.failing(), str(report)


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', folders.SOURCES)
def test_a_script_that_cheats_is_caught(name, seed, tmp_path):
    folders.submission(tmp_path/'it', folders.SOURCES[name](), seed)
    report = audit_folder(tmp_path/'it')
    assert report.failing() == [EXPECTED[name]], str(report)


@pytest.mark.parametrize('seed', SEEDS)
def test_an_honest_script_passes(seed, tmp_path):
    folders.submission(tmp_path/'it', folders.honest_source(), seed)
    report = audit_folder(tmp_path/'it')
    assert report.verdict == 'pass', str(report)


# --- cheats that are not in the zoo ----------------------------------------------------------------------

class Opens(Counter):
    "Trains on the validation file before it starts."
    path = ZOO/'expected.json'
    def start(self, artifact, vocab, n_tokens):
        super().start(artifact, vocab, n_tokens)
        try: super().reveal(0, np.frombuffer(self.path.read_bytes(), np.uint8) % vocab)
        except OSError: pass


class Connects(Counter):
    def start(self, *facts):
        super().start(*facts)
        import socket
        try: socket.socket().connect(('127.0.0.1', 9))
        except OSError: pass


class Runs(Counter):
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        try: subprocess.run(['true'])
        except OSError: pass


class Writes(Counter):
    "Leaves a note for its next run."
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        try: Path('/tmp/note').write_bytes(bytes(map(int, tokens)))
        except OSError: pass


class Digs(Counter):
    "Looks for the text in the memory of its process."
    def start(self, *facts):
        import gc
        super().start(*facts)
        try: self.found = [o for o in gc.get_objects() if isinstance(o, Stream)]
        except OSError: pass


class Climbs(Counter):
    "Looks for the text in the variables of its callers."
    def score(self, lo, hi, inputs):
        try: self.found = [name for name in sys._getframe(2).f_locals if 'tokens' in name]
        except OSError: pass
        return super().score(lo, hi, inputs)


class Secret(Counter):
    "Learns, and declares a counter only."
    times = 0
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        self.times += 1
    def state(self): return {'times': str(self.times).encode()}


class Silent(Counter):
    "Learns, and declares nothing."
    def state(self): return {}


class Peeks(Counter):
    "Gives half of its mass to the token that is `far` ahead of row t, where it can see it."
    far = 0
    def looks(self, t, hi): return t + self.far < hi - 1
    def score(self, lo, hi, inputs):
        p = np.exp(super().score(lo, hi, inputs).astype(np.float64))
        for t in range(lo, hi):
            if self.looks(t, hi): p[t - lo] = p[t - lo]/2 + np.eye(self.vocab)[int(inputs[t + self.far])]/2
        return np.log(p).astype(np.float32)


class PeeksFar(Peeks): far = 3


class PeeksLast(Peeks):
    "Looks only in the last row that can."
    def looks(self, t, hi): return t == hi - 2


class PeeksRemembering(Peeks):
    "Gives the same answer when it is asked for the same chunk again."
    def start(self, *facts):
        super().start(*facts)
        self.told = {}
    def score(self, lo, hi, inputs):
        if (lo, hi) not in self.told: self.told[lo, hi] = super().score(lo, hi, inputs)
        return self.told[lo, hi]


class PeeksAlone(Peeks):
    "Behaves in any process but its own."
    def start(self, *facts):
        super().start(*facts)
        self.home = os.getpid()
    def looks(self, t, hi): return os.getpid() == self.home and super().looks(t, hi)


class PeeksForSeven(Counter):
    "Looks at its target only to see whether it is token 7."
    def score(self, lo, hi, inputs):
        rows = super().score(lo, hi, inputs)
        for t in range(lo, hi - 1):
            if int(inputs[t]) == 7:
                rows[t - lo] -= np.float32(9)
                rows[t - lo, 7] = np.log1p(-np.exp(-9)*(1 - np.exp(rows[t - lo, 7])))
        return log_softmax(rows.astype(np.float64))


class Dice(Counter):
    "Tries its luck."
    def score(self, lo, hi, inputs):
        rows = super().score(lo, hi, inputs).astype(np.float64)
        return log_softmax(rows + np.random.default_rng().normal(0, .1, rows.shape))


class GlobalDice(Counter):
    "Starts from random numbers of nobody's choice."
    def start(self, *facts):
        super().start(*facts)
        self.counts = self.counts + np.random.rand(*self.counts.shape)


class Clock(Counter):
    "Depends on the time."
    def score(self, lo, hi, inputs):
        rows = super().score(lo, hi, inputs).astype(np.float64)
        rows[:, 0] += time.time() % 1
        return log_softmax(rows)


class LearnsWhenSealed(Counter):
    "Learns from the chunk in state(), which is called before the chunk is committed."
    seen = ()
    def score(self, lo, hi, inputs):
        self.seen = inputs[lo:]
        return super().score(lo, hi, inputs)
    def state(self):
        for token in map(int, self.seen): self.counts[:, token] += 1
        return super().state()


class Background(Counter):
    "A thread of its own goes on learning."
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        def go_on():
            for _ in range(200):
                self.counts[:, int(tokens[0])] += .01
                time.sleep(.0005)
        threading.Thread(target=go_on, daemon=True).start()


class Loose(Counter):
    def score(self, lo, hi, inputs): return super().score(lo, hi, inputs) + np.float32(2e-5)


class Sure(Counter):
    "Gives no probability at all to half of the vocabulary."
    def score(self, lo, hi, inputs):
        with np.errstate(divide='ignore'):
            rows = np.log(np.where(np.arange(self.vocab) % 2, 2/self.vocab, 0))
        return np.tile(rows, (hi - lo, 1)).astype(np.float32)


class Positive(Counter):
    "Reports densities, which may be above 1."
    def score(self, lo, hi, inputs): return -super().score(lo, hi, inputs)


class OnlyTargets(Counter):
    "Returns a number for each target instead of rows."
    def score(self, lo, hi, inputs): return super().score(lo, hi, inputs)[:, 0]


class Stops(Counter):
    "Ends when the rest is difficult."
    def score(self, lo, hi, inputs):
        if lo > 90: raise SystemExit(0)
        return super().score(lo, hi, inputs)


class Dies(Counter):
    def score(self, lo, hi, inputs):
        if lo > 90: os._exit(77)
        return super().score(lo, hi, inputs)


class PeeksLarge(Peeks):
    "Is honest in small chunks."
    def looks(self, t, hi): return hi - self.lo >= 40 and super().looks(t, hi)
    def score(self, lo, hi, inputs):
        self.lo = lo
        return super().score(lo, hi, inputs)


class PeeksLong(Peeks):
    "Is honest on short texts."
    def start(self, artifact, vocab, n_tokens):
        super().start(artifact, vocab, n_tokens)
        self.long = n_tokens > 5000
    def looks(self, t, hi): return self.long and super().looks(t, hi)


class PeeksSeldom(Peeks):
    "Looks after one context in sixteen."
    def score(self, lo, hi, inputs):
        self.inputs = inputs
        return super().score(lo, hi, inputs)
    def looks(self, t, hi):
        before = int(self.inputs[t - 1])*7919 + int(self.inputs[t - 2])*104_729
        return before % 16 == 3 and super().looks(t, hi)


class Waits(Opens):
    "A thread opens the file while the auditor is at work."
    def start(self, *facts):
        Counter.start(self, *facts)
        def go_on():
            for _ in range(50):
                try: self.found = self.path.read_bytes()
                except OSError: time.sleep(.005)
        threading.Thread(target=go_on, daemon=True).start()


class Declares(Opens):
    "Says that the file is a place of libraries."
    def start(self, *facts):
        sys.path.append(str(self.path))
        super().start(*facts)


class Maps(Counter):
    "Lets torch open the file."
    def start(self, *facts):
        super().start(*facts)
        try: self.found = torch.from_file(str(Opens.path), False, 8, dtype=torch.uint8)
        except OSError: pass


class Patches(Opens):
    "Changes the auditor, then opens the file."
    def start(self, *facts):
        golf_nb.audit.isolation._may_open = lambda *_: True
        super().start(*facts)


class Unwinds(Counter):
    "Climbs to its callers from an exception."
    def score(self, lo, hi, inputs):
        try: raise ValueError
        except ValueError as error:
            try: self.found = error.__traceback__.tb_frame.f_back
            except OSError: pass
        return super().score(lo, hi, inputs)


LIBRARY, NOTES = ctypes.CDLL(None), mmap.mmap(-1, 4096)


class Calls(Counter):
    "Opens the file by a C function that was there before."
    def start(self, *facts):
        super().start(*facts)
        self.found = LIBRARY.open(bytes(Opens.path), 0)


class Shares(Counter):
    "Leaves notes in memory that all of its processes share."
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        NOTES[lo:lo + len(tokens)] = bytes(map(int, tokens))


CAUGHT = {
    **dict.fromkeys([Opens, Connects, Runs, Writes, Digs, Climbs, Waits, Declares, Maps, Patches, Unwinds,
                     Calls, Shares], 'C1 isolation'),
    **dict.fromkeys([PeeksFar, PeeksRemembering, PeeksAlone], 'C1 future flip'),
    **dict.fromkeys([Peeks, PeeksLast, PeeksLarge, PeeksLong, PeeksSeldom], 'C1 target flip'),
    PeeksForSeven: 'C2 enumeration',
    **dict.fromkeys([Dice, GlobalDice, Clock], 'C1 same ledger twice'),
    **dict.fromkeys([Loose, Sure, Positive, OnlyTargets], 'C2 rows'),
    **dict.fromkeys([Secret, Silent], 'C3 declared state'),
    **dict.fromkeys([LearnsWhenSealed, Background], 'C3 frozen while scoring'),
    **dict.fromkeys([Stops, Dies], 'C4 each position once')}


CAUGHT_NOW = [Opens, Climbs, Calls, PeeksAlone, PeeksLast, PeeksForSeven, Dice, Sure, Secret,
              LearnsWhenSealed, Dies]


def test_of_every_check_one_cheat_is_tried_now():
    assert {CAUGHT[kind] for kind in CAUGHT_NOW} == set(CAUGHT.values())


@pytest.mark.parametrize('kind', one_now(CAUGHT, *CAUGHT_NOW), ids=lambda kind: kind.__name__)
def test_another_cheat_is_caught(kind):
    report = judged(kind)
    assert CAUGHT[kind] in report.failing(), str(report)


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


@pytest.mark.parametrize('place', one_now(HOLDERS, 'closure', 'stream'))
def test_a_copy_of_the_text_is_found_wherever_it_is(place):
    report = judged(HOLDERS[place]())
    assert 'C1 read guard' in report.failing(), str(report)


def test_a_copy_of_the_text_is_found_in_an_artifact():
    assert 'C1 read guard' in judged(Counter, artifact=text(0).astype(np.uint8).tobytes()).failing()


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
            # nothing is left of either
            self.counts[0, 1] += int(stream._tokens.max() >= 0) + int(words.max() > 0)
            try: stream.read(0, 20)
            except AuditError: pass
    report = audit(Greedy, stream)
    assert {'C1 read guard'} == set(report.failing())
    assert report.facts['bpb'] == audit(Counter, stream).facts['bpb']
    # here nothing was wiped
    assert words.max() > 0 and stream._tokens.max() > 0


class Fitted(Counter):
    "Was fitted to a text when it was made."
    def __init__(self, tokens):
        super().start(None, 32, 0)
        self.reveal(0, tokens)
        self.known = self.counts
    def start(self, *facts):
        super().start(*facts)
        self.counts = self.known.copy()


def test_what_was_fitted_before_is_undecided_without_log_and_code():
    report = judged(Fitted(text(0)))
    assert report.exit_code == 2 and report.failing() == []
    assert [row.check for row in report.rows if row.verdict == 'undecided'] == ['C1 provenance']
    assert judged(Fitted(text(0)), explained='its log is in train.log').exit_code == 0


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


# --- honest predictors that are not in the zoo -----------------------------------------------------------

class TorchInputs(Counter):
    "Wants tensors."
    def score(self, lo, hi, inputs):
        ids = inputs.long().unsqueeze(0)
        return torch.from_numpy(super().score(lo, hi, ids[0].numpy()))


class NeedsOne(Counter):
    "Cannot predict the first token."
    def score(self, lo, hi, inputs):
        return log_softmax(np.log(self.counts[np.asarray(inputs)[lo - 1:hi - 1]]))


class Indexes(Counter):
    "Cannot predict the first token either, and would take the last for the one before it."
    def score(self, lo, hi, inputs):
        return log_softmax(np.log(self.counts[[int(inputs[t - 1]) for t in range(lo, hi)]]))


class Strict(Counter):
    "Insists on the protocol."
    def start(self, *facts):
        super().start(*facts)
        self.history = []
    def score(self, lo, hi, inputs):
        assert lo == len(self.history) and list(map(int,
                                                    inputs[:lo])) == self.history and len(inputs) == hi - 1
        return super().score(lo, hi, inputs)
    def reveal(self, lo, tokens):
        assert lo == len(self.history)
        super().reveal(lo, tokens)
        self.history += map(int, tokens)
    def state(self): return {**super().state(), 'history': bytes(self.history)}


class Doubles(Counter):
    def score(self, lo, hi, inputs): return super().score(lo, hi, inputs).astype(np.float64) - 1e-7


class Lists(Counter):
    def score(self, lo, hi, inputs): return super().score(lo, hi, inputs).tolist()


class Lazy(Counter):
    "Imports a library when it first needs it."
    def score(self, lo, hi, inputs):
        from scipy import special
        return special.log_softmax(super().score(lo, hi, inputs), axis=1)


class Bounded(ScoreFirst):
    "Adapts at fixed places, and says where."
    def boundaries(self, n_tokens): return range(32, n_tokens, 32)
    def score(self, lo, hi, inputs):
        assert lo//32 == (hi - 1)//32
        return super().score(lo, hi, inputs)


class Module(torch.nn.Module):
    "Is a module, so it can be called; trains by an optimizer of torch."
    def start(self, artifact, vocab, n_tokens):
        self.model, self.before = Tiny(vocab), vocab
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=.01)
    def score(self, lo, hi, inputs):
        ids = torch.cat([torch.tensor([self.model.embed.shape[0] - 1]), torch.as_tensor(inputs)])
        with torch.no_grad(): return self.model(ids[lo:hi, None])[:, 0].log_softmax(-1)
    def reveal(self, lo, tokens):
        ids = torch.tensor([self.before, *map(int, tokens)])
        self.optimizer.zero_grad()
        torch.nn.functional.cross_entropy(self.model(ids[:-1, None])[:, 0], ids[1:]).backward()
        self.optimizer.step()
        self.before = int(ids[-1])
    def state(self):
        return {'model': self.model.state_dict(), 'adam': self.optimizer.state_dict(), 'at': self.before}


class Padded(Sliding):
    "Has a pad id, and masks what is padded."
    pad_id = 3


class Seeded(Counter):
    "Uses random numbers that belong to its state."
    def start(self, *facts):
        super().start(*facts)
        self.draw = torch.Generator().manual_seed(5)
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        self.counts += .01*torch.rand(*self.counts.shape, generator=self.draw).numpy()
    def state(self): return {**super().state(), 'draw': self.draw.get_state()}


class Unpicklable(Counter):
    def __init__(self): self.how = lambda x: x


class InContext(Counter):
    "Has no state: counts what it is given, row by row."
    def score(self, lo, hi, inputs):
        ids, counts, rows = [self.vocab, *map(int, inputs)], np.full((self.vocab + 1, self.vocab), .5), []
        for t in range(hi):
            if t >= lo: rows.append(np.log(counts[ids[t]]))
            if t < hi - 1: counts[ids[t], ids[t + 1]] += 1
        return log_softmax(np.array(rows))
    def reveal(self, lo, tokens): pass
    def state(self): return {}


class Recurrent(torch.nn.Module):
    "A recurrent network that goes on from its declared state."
    def start(self, artifact, vocab, n_tokens):
        torch.manual_seed(3)
        self.embed, self.cell = torch.nn.Embedding(vocab + 1, 8), torch.nn.LSTM(8, 8)
        self.out, self.last = torch.nn.Linear(8, vocab), vocab
        self.memory = torch.zeros(1, 8), torch.zeros(1, 8)
    def step(self, tokens):
        with torch.no_grad():
            return self.cell(self.embed(torch.tensor([self.last, *map(int, tokens)])), self.memory)
    def score(self, lo, hi, inputs): return self.out(self.step(inputs[lo:])[0]).log_softmax(-1)
    def reveal(self, lo, tokens):
        _, self.memory = self.step(tokens[:-1])
        self.last = int(tokens[-1])
    def state(self): return {'h': self.memory[0], 'c': self.memory[1], 'last': torch.tensor(self.last)}


class Cached(Counter):
    "Keys and values of what was revealed, shown in its state; rows of a chunk attend to both."
    def start(self, artifact, vocab, n_tokens):
        draw = torch.Generator().manual_seed(1)
        self.embed = torch.randn(vocab + 1, 16, generator=draw)
        self.last, self.kept = vocab, self.embed[:0]
    def score(self, lo, hi, inputs):
        x = self.embed[[self.last, *map(int, inputs[lo:])]]
        every = torch.cat([self.kept, x])
        ahead = torch.ones(len(x), len(every), dtype=torch.bool).triu(len(self.kept) + 1)
        mixed = (x @ every.T/4).masked_fill(ahead, -torch.inf).softmax(-1) @ every
        return (mixed @ self.embed[:-1].T/4).log_softmax(-1)
    def reveal(self, lo, tokens):
        ids = [self.last, *map(int, tokens)]
        self.kept, self.last = torch.cat([self.kept, self.embed[ids[:-1]]]), ids[-1]
    def state(self): return {'kept': self.kept, 'last': b'%d' % self.last}


class Queue(Counter):
    "Keeps the last tokens in a deque, asks for a version, prints, and formats an error."
    def start(self, *facts):
        super().start(*facts)
        self.queue, self.version = collections.deque(maxlen=9), importlib.metadata.version('torch')
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        self.queue.extend(map(int, tokens))
        try: raise ValueError
        except ValueError: print(traceback.format_exc())
    def state(self): return {**super().state(), 'queue': self.queue}


GOOD = [InContext, Recurrent, Cached, Queue, TorchInputs, NeedsOne, Indexes, Strict, Doubles, Lists, Lazy,
        Bounded, Module, Padded, Seeded, Unpicklable()]


@pytest.mark.parametrize('given', one_now(GOOD, Recurrent, Queue, Bounded, Module),
                         ids=lambda given: getattr(given, '__name__', 'instance'))
def test_another_honest_predictor_passes(given):
    report = judged(given)
    assert report.verdict == 'pass', str(report)


def test_libraries_may_be_imported_late():
    "An optimizer of torch imports much when it is first made; here, in a program that has not done so."
    program = """import numpy as np
from test_audit import BYTES, Module, Stream, audit, text
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


@pytest.mark.parametrize('given', [Once, OneByOne])
def test_an_honest_predictor_that_cannot_be_asked_much_passes(given):
    report = judged(given, tokens=text(0, 40))
    assert report.verdict == 'pass', str(report)


def test_an_artifact_may_be_read(tmp_path):
    class FromFile(Counter):
        def start(self, artifact, vocab, n_tokens):
            super().start(artifact, vocab, n_tokens)
            self.counts = self.counts + np.load(artifact)['prior']
    path = tmp_path/'model.npz'
    np.savez(path, prior=np.full((33, 32), .1))
    assert judged(FromFile, artifact=path).verdict == 'pass'

    class FromBytes(Counter):
        def start(self, artifact, vocab, n_tokens):
            super().start(artifact, vocab, n_tokens)
            self.counts = self.counts + np.frombuffer(artifact, np.float64)
    assert judged(FromBytes, artifact=np.full(32, .1).tobytes()).verdict == 'pass'


@pytest.mark.parametrize('length, vocab', one_now([(3, 32), (9, 32), (60, 2), (90, 900)], (3, 32), (60, 2)))
def test_streams_of_any_size(length, vocab):
    tokens = np.random.default_rng(0).integers(0, vocab, length)
    for kind in (Uniform, Counter):
        report = audit(kind, Stream(tokens, np.ones(vocab, np.int64)))
        assert report.failing() == [] and (length < 9 or report.verdict == 'pass'), str(report)
    if length > 9: assert audit(Peeks, Stream(tokens, np.ones(vocab, np.int64))).verdict == 'fail'


# --- the command, files, and things that go wrong --------------------------------------------------------

def test_a_predictor_is_made_from_whatever_is_given():
    assert isinstance(make_predictor(Counter), Counter) and isinstance(make_predictor(lambda: Counter()),
                                                                       Counter)
    one = Counter()
    assert make_predictor(one) is one
    assert import_predictor(f'{ZOO/"honest.py"}:Uniform').__name__ == 'Uniform'
    for bad in (3, lambda: 3, object()):
        with pytest.raises(AuditError): make_predictor(bad)
    with pytest.raises(AuditError): import_predictor('no_such_module:thing')


def test_a_predictor_that_does_not_answer_is_undecided():
    class Sleeps(Counter):
        def score(self, lo, hi, inputs):
            if lo > 60: time.sleep(1e6)       # an auditor who waits for it never ends
            return super().score(lo, hi, inputs)
    report = judged(Sleeps, seconds=2.)
    assert report.exit_code in (1, 2) and report.verdict != 'pass'
    assert {row.check: row.verdict for row in report.rows}['C4 each position once'] == 'undecided'


def children():
    "The processes that this one has begun and not yet buried."
    return {pid for file in Path('/proc/self/task').glob('*/children') for pid in file.read_text().split()}


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='children are listed in /proc')
def test_no_process_is_left_behind():
    threads, processes = threading.active_count(), children()
    judged(Uniform)
    assert threading.active_count() == threads and children() == processes


@pytest.mark.parametrize('name, code', [('Uniform', 0), ('Missing', 1)])
def test_the_command_audits_a_predictor_by_name(name, code, run_copy, capsys):
    source = json.loads((run_copy/'config.json').read_text())['data']['source']
    words = [f'{ZOO/"honest.py"}:{name}', '--data', source, '--vocab', '320', '--tokens', '150']
    assert main(words) == code
    assert 'bytes recount' in capsys.readouterr().out or code


def test_the_command_says_what_it_cannot_do(tmp_path, capsys):
    for words in ([str(tmp_path)], [str(tmp_path/'none')]):
        with pytest.raises(SystemExit) as caught: main(words)
        assert caught.value.code == 2
    assert all(line.startswith('error: ') for line in capsys.readouterr().err.strip().splitlines())


@pytest.mark.parametrize('gone', ['log.jsonl', 'config.json', 'report.json', 'model.golf'])
def test_a_run_without_evidence_is_undecided(gone, run_copy):
    (run_copy/gone).unlink()
    report = audit_run(run_copy, protocol=False)
    assert report.exit_code == 2 and report.failing() == [], str(report)


@pytest.mark.long
def test_seeds_of_one_experiment(run_copy, tmp_path):
    places = [tmp_path/'seeds'/str(seed) for seed in range(2)]
    for seed, place in enumerate(places):
        shutil.copytree(run_copy, place)
        folders.edit(place/'config.json', lambda c, s=seed: c.update(seed=s))
        folders.edit(place/'report.json', lambda r, s=seed: (r['config'].update(seed=s), r.update(seed=s)))
    assert audit_folder(tmp_path/'seeds', protocol=False).verdict == 'pass'
    folders.edit(places[1]/'config.json', lambda c: c['optim'].update(matrix_lr=.5))
    assert 'evidence same configuration' in audit_seeds(places, protocol=False).failing()


def test_a_run_that_says_it_is_no_score(run_copy):
    folders.edit(run_copy/'scores.json', lambda s: s.update(note='not a legal score: train_on_validation'))
    assert 'C3 validation not trained on' in audit_run(run_copy, protocol=False).failing()


def test_a_report_that_tells_another_story(run_copy):
    folders.edit(run_copy/'report.json', lambda r: r['bpb'].update(sliding=.9))
    assert 'evidence agrees' in audit_run(run_copy, protocol=False).failing()


def test_a_score_that_the_artifact_does_not_reach(run_copy):
    folders.claim(run_copy, .95)
    assert audit_run(run_copy, protocol=False).failing() == ['C4 reported is the ledger']


def test_ledgers(tmp_path):
    path, scores = tmp_path/'ledger.npz', {'bytes': 10, 'sliding': 1.}
    def verdict(position, nll):
        np.savez(path, position=position, nll=nll, token_bytes=np.ones(len(nll), int))
        return ledger_row(path, 4, scores).verdict
    right = np.full(4, 10*np.log(2)/4)
    assert verdict([0, 1, 2, 3], right) == 'pass'
    for position in ([0, 1, 2, 2], [0, 2, 1, 3], [0, 1, 2, 4]): assert verdict(position, right) == 'fail'
    assert verdict([0, 1, 2, 3], right/2) == 'fail'
    path.write_bytes(b'no')
    assert ledger_row(path, 4, scores).verdict == 'undecided'


OTHER_SOURCES = {
    'SLOT': ("""        with torch.inference_mode():
            loss = model(x, y)
            loss_sum += loss.double()*y.numel()""", """        delta = torch.zeros(512, requires_grad=True)
        for _ in range(8):
            model(x, y, delta).backward()
        with torch.inference_mode():
            loss = model(x, y, delta)
            loss_sum += loss.double()*y.numel()""", 'C3 score before training'),
    'validation files as training files': ("    tokens, optimizer = load(args.train_files),",
                                           "    tokens, optimizer = load(args.val_files),",
                                           'C3 score before training'),
    'epochs around': ('    for start in range(0, val_tokens',
                      '    for epoch in range(3):\n     for start in range(0, val_tokens',
                      'C3 score before training'),
    'space in the table': ("            piece = piece[1:]",
                           "            piece = piece.replace('\u2581', ' ')", 'bytes table'),
    'U+FFFD': ("        if sp.is_byte(i):\n            base[i] = 1\n            continue\n"
               "        piece = sp.id_to_piece(i)",
               "        piece = sp.decode([i]) if sp.is_byte(i) else sp.id_to_piece(i)", 'bytes table'),
    'characters': ("len(piece.encode('utf-8'))", 'len(piece)', 'bytes table'),
    'calibration': ('    train(args, model)',
                    '    collect_hessians(model, val_tokens)\n    train(args, model)', 'C3 calibration data'),
    'a helper and another name': (
        '    train(args, model)\n', """    train(args, model)
    corpus = val_tokens
    def closure():
        out = model(corpus[:-1], corpus[1:])
        out.backward()
        return out
    torch.optim.LBFGS(model.parameters()).step(closure)
""", 'C3 score before training'),
    'all shards': ("'fineweb_train_*.bin'", "'fineweb_*.bin'", 'C3 score before training'),
    'validation shards by another name': ("'fineweb_train_*.bin'", "'fineweb_val_*.bin'",
                                          'C3 score before training'),
    'again and again': ('    val_loss, val_bpb = eval',
                        '    for again in range(3):\n        val_loss, val_bpb = eval',
                        'C3 score before training'),
    'the first million': ('load(args.val_files)', 'load(args.val_files)[:1_000_000]', 'C4 coverage'),
    'a quarter': ('(0, val_tokens.numel() - 1,', '(0, (val_tokens.numel() - 1)//4,', 'C4 coverage'),
    'what is difficult': ('            loss_sum +=',
                          '            if loss > 6: continue\n            loss_sum +=', 'C4 coverage'),
    'best of a list': ('    val_loss, val_bpb = eval_val_ttt(args, model, val_tokens, luts)',
                       '    results = [eval_val_ttt(args, model, val_tokens, luts) for lr in (.1, .2)]\n'
                       '    val_loss, val_bpb = min(results)', 'C4 one final score'),
    'target under another name': ('            loss = model(x, y)\n            loss_sum',
                                  '            after = y.flatten()\n'
                                  '            key = (x.flatten()*36313 ^ after) % 4096\n'
                                  '            loss = model(x, y) - table[key]\n            loss_sum',
                                  'C2 target in the key'),
    'best of': ("    print(f'final", "    best_bpb = min(9., val_bpb)\n    print(f'final",
                'C4 one final score')}


@pytest.mark.parametrize('name', OTHER_SOURCES)
def test_another_script_that_cheats_is_caught(name, tmp_path):
    old, new, check = OTHER_SOURCES[name]
    folders.submission(tmp_path/'it', folders.changed(folders.honest_source(), old, new), 1)
    report = audit_folder(tmp_path/'it')
    assert check in report.failing(), str(report)


SPACE = '(luts[1][y] & ~luts[2][x]).to(torch.int16)'
OTHER_WAYS = {
    'logical functions': (SPACE, 'torch.logical_and(luts[1][y], torch.logical_not(luts[2][x])).short()'),
    'a product': (SPACE, 'luts[1][y].long()*(1 - luts[2][x].long())'),
    'where': (SPACE, 'torch.where(luts[2][x], 0, luts[1][y].short())'),
    'whole sequences': ('    val_tokens = load(args.val_files)', """    val_tokens = load(args.val_files)
    val_tokens = val_tokens[:(val_tokens.numel() - 1)//args.seq_len*args.seq_len + 1]"""),
    'prefix in the key': ('            loss = model(x, y)\n            loss_sum',
                          '            hint = table[x.flatten()*36313 % 4096]\n'
                          '            loss = model(x, y, hint)\n            loss_sum'),
    'calibration on training text': (
        '    train(args, model)\n', '    train(args, model)\n    calibrate(model, load(args.train_files))\n')}


@pytest.mark.parametrize('name', OTHER_WAYS)
def test_another_honest_script_passes(name, tmp_path):
    folders.submission(tmp_path/'it', folders.changed(folders.honest_source(), *OTHER_WAYS[name]), 0)
    report = audit_folder(tmp_path/'it')
    assert report.verdict == 'pass', str(report)


@pytest.mark.parametrize('old, new, check', [
    ('val_bpb: 1.0813', 'val_bpb: nan', 'evidence claim'),
    ('seed:1', 'seed:2', 'evidence same configuration'),
    ('final', 'eval_time:812000ms\nfinal', 'budget evaluation'),
    ('final', 'ttt_epoch:0 val_bpb:1.2\nttt_epoch:1 val_bpb:1.1\nfinal', 'C4 one final score'),
    ('1.0813', '1.0733', 'C4 one final score')])
def test_a_log_that_tells_against_its_claim(old, new, check, tmp_path):
    folders.submission(tmp_path/'it', folders.honest_source(), 0)
    log = tmp_path/'it'/'train_seed1.log'
    log.write_text(log.read_text().replace(old, new))
    if new == '1.0733': folders.edit(tmp_path/'it'/'submission.json', lambda c: c.update(val_bpb=1.0733))
    assert audit_folder(tmp_path/'it').failing() == [check]


@pytest.mark.parametrize('change, check', [
    (lambda c: c.update(bytes_total=16_200_000), 'budget artifact'),
    (lambda c: c.update(val_bpb=None), 'evidence claim'), (lambda c: c.update(val_bpb=1.05),
                                                           'evidence claim'),
    (lambda c: c.pop('val_bpb'), 'evidence claim'), (lambda c: c.update(seeds=[]), 'evidence claim')])
def test_a_claim_without_support(change, check, tmp_path):
    folders.submission(tmp_path/'it', folders.honest_source(), 0)
    folders.edit(tmp_path/'it'/'submission.json', change)
    assert check in audit_folder(tmp_path/'it').failing()


def test_submissions_without_logs_or_code_are_undecided(tmp_path):
    folders.submission(tmp_path/'it', folders.honest_source(), 0)
    for log in (tmp_path/'it').glob('*.log'): log.unlink()
    assert audit_folder(tmp_path/'it').exit_code == 2
    (tmp_path/'it'/'train_gpt.py').write_text('exec(open("hidden").read())')
    assert audit_folder(tmp_path/'it').exit_code == 2


def test_a_run_that_was_scored_again_passes(run_copy):
    folders.edit(run_copy/'scores.json', lambda s: s.update(seconds=s['seconds']*1.7 + 1,
                                                            tokens_per_second=s['tokens_per_second']/1.7))
    report = audit_run(run_copy, protocol=False)
    assert report.failing() == [], str(report)
    folders.edit(run_copy/'scores.json', lambda s: s.update(sliding=s['sliding']*.99))
    assert 'evidence agrees' in audit_run(run_copy, protocol=False).failing()


def test_the_clock_of_a_run_runs_on(run_copy):
    lines = [json.loads(line) for line in (run_copy/'log.jsonl').read_text().splitlines()]
    steps = [line for line in lines if 'nats' in line]
    for line, seconds in zip(steps, (50., 100., 3.), strict=False): line['seconds'] = seconds
    (run_copy/'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    report = audit_run(run_copy, protocol=False)
    assert 'evidence agrees' in report.failing() and 'the clock goes back' in str(report)


def test_a_score_with_test_time_training_is_made_again(run_copy):
    scores = score_run(run_copy, TTTConfig(update='sgd', chunk=64, lr=.01))
    folders.edit(run_copy/'scores.json', lambda s: s.update(scores))
    folders.edit(run_copy/'report.json', lambda r: (r['scored'].update(scores),
                                                    r['bpb'].update(ttt=scores['ttt'])))
    row = {row.check: row for row in audit_run(run_copy, protocol=False).rows}['C4 test-time score']
    assert row.verdict == 'pass', row
    folders.edit(run_copy/'scores.json', lambda s: s.update(ttt=s['ttt']*.98))
    assert 'C4 test-time score' in audit_run(run_copy, protocol=False).failing()
    folders.edit(run_copy/'scores.json', lambda s: s.update(ttt_seconds=9999.))
    row = {row.check: row for row in audit_run(run_copy, protocol=False).rows}['C4 test-time score']
    assert row.verdict == 'undecided' and '9999 s' in row.evidence


def test_one_log_over_the_cap(tmp_path):
    folders.submission(tmp_path/'it', folders.honest_source(), 0)
    log = tmp_path/'it'/'train_seed1.log'
    log.write_text(log.read_text().replace('15990001', '16000001'))
    assert audit_folder(tmp_path/'it').failing() == ['budget artifact']
