"Predictors that break a rule, or get round a check; `CAUGHT` names the row that must tell."
import ctypes
import inspect
import mmap
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import sentencepiece
import torch

import golf_nb
from golf_nb.audit.stream import Stream

from .honest import Counter, log_softmax

HERE = Path(__file__).with_name('expected.json')      # a file that no predictor was given


class Opens(Counter):
    "Trains on the validation file before it starts."
    path = HERE
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


class FailsInCopies(Peeks):
    "Answers in no process but its own, and sees its target there."
    def start(self, *facts):
        super().start(*facts)
        self.home = os.getpid()
    def score(self, lo, hi, inputs):
        if os.getpid() != self.home: raise RuntimeError('busy')
        return super().score(lo, hi, inputs)


class AnswersOnce(Peeks):
    "Answers once for each chunk."
    told = frozenset()
    def score(self, lo, hi, inputs):
        if lo in self.told: raise RuntimeError('asked before')
        self.told = self.told | {lo}
        return super().score(lo, hi, inputs)


class AvoidsTheMiddle(PeeksAlone):
    "Is honest in copies, and where an auditor would flip by habit: middle, ends, and the last token."
    def score(self, lo, hi, inputs):
        self.habits = {lo, (lo + hi)//2, hi - 2, hi - 1}
        return super().score(lo, hi, inputs)
    def looks(self, t, hi): return t not in self.habits and super().looks(t, hi)


class PeeksInAPool(Peeks):
    "Lets a thread of a pool look, which no copy has."
    def start(self, *facts):
        super().start(*facts)
        self.pool = ThreadPoolExecutor(1)
    def score(self, lo, hi, inputs): return self.pool.submit(super().score, lo, hi, inputs).result()


class PeeksFaintly(Peeks):
    "Adds a thousandth of what it sees."
    def score(self, lo, hi, inputs):
        seen, plain = np.exp(super().score(lo, hi, inputs)), np.exp(Counter.score(self, lo, hi, inputs))
        return np.log(.001*seen + .999*plain).astype(np.float32)


def keyed(before, target): return (before*36313 ^ target*27191) % 97


class KeyInAHelper(Counter):
    "Trusts a token more if its hash, made in a helper, was seen; the target makes the key."
    def start(self, artifact, vocab, n_tokens):
        super().start(artifact, vocab, n_tokens)
        self.seen = np.zeros(97, bool)
    def score(self, lo, hi, inputs):
        rows = super().score(lo, hi, inputs).astype(np.float64)
        for t in range(max(lo, 1), hi - 1):
            target = int(inputs[t])
            if self.seen[keyed(int(inputs[t - 1]), target)]: rows[t - lo, target] += 2
        return log_softmax(rows)
    def reveal(self, lo, tokens):
        ids = [self.last, *map(int, tokens)]
        super().reveal(lo, tokens)
        for pair in zip(ids, ids[1:], strict=False): self.seen[keyed(*pair)] = True
    def state(self): return {**super().state(), 'seen': self.seen}


class SharesAnArray(Counter):
    "An array over memory that all copies share, made when the run begins."
    def start(self, *facts):
        super().start(*facts)
        self.notes = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)
    def score(self, lo, hi, inputs):
        self.notes[lo:hi - 1] = inputs[lo:]
        return super().score(lo, hi, inputs)


ARRAY = np.frombuffer(mmap.mmap(-1, 4096), np.uint8)


class SharesAnOldArray(Counter):
    "The same, made before the audit and reached only by name."
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        getattr(sys.modules[__name__], 'ARR' + 'AY')[lo:lo + len(tokens)] = [int(token) for token in tokens]


class SharesATensor(Counter):
    def start(self, *facts):
        super().start(*facts)
        try: self.notes = torch.zeros(64).share_memory_()
        except (OSError, RuntimeError): pass


class Pipes(Counter):
    "Copies tell the original by a pipe what they were asked."
    def start(self, *facts):
        super().start(*facts)
        self.ends = os.pipe()


class PatchesOs(Opens):
    "Changes what the guard asks, then opens the file."
    def start(self, *facts):
        os.fsdecode = lambda path: '/dev/null'
        super().start(*facts)


class FalseFile(Opens):
    "Says that the file is the source of a module."
    def start(self, *facts):
        module = types.ModuleType('helpful')
        module.__file__ = str(self.path)
        sys.modules['helpful'] = module
        super().start(*facts)


class ListsFolders(Counter):
    "Reads the names of files."
    def start(self, *facts):
        super().start(*facts)
        try: self.found = os.listdir(HERE.parent.parent.parent/'nbs')
        except OSError: pass


class ListsByLibrary(Counter):
    def start(self, *facts):
        super().start(*facts)
        try: self.found = [path.name for path in HERE.parent.parent.parent.joinpath('nbs').iterdir()]
        except OSError: pass


class MakesNodes(Counter):
    "Leaves a note in the name of a node."
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        try: os.mknod(f'/tmp/note-{lo}')
        except OSError: pass


class ReadsInCompiledCode(Counter):
    "Lets SentencePiece read the file."
    def start(self, *facts):
        super().start(*facts)
        try: sentencepiece.SentencePieceProcessor().LoadFromFile(str(HERE))
        except (OSError, RuntimeError): pass


class ReadsByZipReader(Counter):
    "Lets the zip reader of torch read the file."
    def start(self, *facts):
        super().start(*facts)
        try: torch._C.PyTorchFileReader(str(HERE))
        except (OSError, RuntimeError): pass


class ReadsMemory(Counter):
    "Looks for the text in the file of its own memory."
    def start(self, *facts):
        super().start(*facts)
        try: self.found = open('/proc/self/mem', 'rb')
        except OSError: pass


class AsksForFrames(Counter):
    "Lets a library fetch the frames of a traceback."
    def score(self, lo, hi, inputs):
        try: raise ValueError
        except ValueError as error:
            try: self.found = inspect.getinnerframes(error.__traceback__)
            except OSError: pass
        return super().score(lo, hi, inputs)


class CompilesAsLibrary(Counter):
    "Searches memory with code that says it belongs to numpy."
    def start(self, *facts):
        super().start(*facts)
        try: exec(compile('import gc; found = gc.get_objects()', np.__file__, 'exec'), {})
        except OSError: pass


class TextInAModule(Counter):
    "Finds the text in a list of the program that audits it."
    kind = 'words'
    def start(self, *facts):
        super().start(*facts)
        self.text = list(sys.modules[__name__].PLACE.get(self.kind) or [])
    def score(self, lo, hi, inputs):
        p = np.exp(super().score(lo, hi, inputs).astype(np.float64))
        for t in range(lo, min(hi, len(self.text))):
            p[t - lo] = p[t - lo]/5 + .8*np.eye(self.vocab)[self.text[t]]
        return np.log(p).astype(np.float32)


PLACE: dict[str, Sequence] = {}      # where a test keeps its text


class TextInATuple(TextInAModule): kind = 'tuple'
class TextInBytes(TextInAModule): kind = 'bytes'


class WarmingWeights:
    "SGD whose learning rate is 0 until the fifth chunk; its momentum, not declared, fills before."
    def start(self, artifact, vocab, n_tokens):
        self.weight, self.speed, self.times, self.vocab = np.zeros(vocab), np.zeros(vocab), 0, vocab
    def score(self, lo, hi, inputs): return np.tile(log_softmax(self.weight[None]), (hi - lo, 1))
    def reveal(self, lo, tokens):
        counts = np.bincount([int(token) for token in tokens], minlength=self.vocab)
        self.speed, self.times = .9*self.speed + counts/len(tokens), self.times + 1
        if self.times > 5: self.weight = self.weight + .1*self.speed
    def state(self): return {'weight': self.weight, 'times': self.times}


def distances(tokens):
    "How far back each token occurred last, 0 where it is new."
    last, found = {}, []
    for t, token in enumerate(map(int, tokens)):
        found.append(t - last[token] if token in last else 0)
        last[token] = t
    return found


class Relative(Counter):
    "Holds no token of the text, only how far back each occurred last."
    begin, share = 0, .98
    def __init__(self, tokens): self.back = ' '.join(f'{d:x}' for d in distances(tokens))
    def score(self, lo, hi, inputs):
        back = [int(d, 16) for d in self.back.split()]
        p = np.exp(super().score(lo, hi, inputs).astype(np.float64))
        for t in range(max(lo, self.begin), hi):
            if 0 < back[t] and t - back[t] < len(inputs):
                seen = np.eye(self.vocab)[int(inputs[t - back[t]])]
                p[t - lo] = (1 - self.share)*p[t - lo] + self.share*seen
        return np.log(p).astype(np.float32)


class RelativeLate(Relative):
    "Begins late."
    begin = 120


class RelativeHalf(Relative):
    "Is careful."
    share = .8


class Forged(Counter):
    "A class that says it is of numpy, with the text in it."
    def __init__(self, tokens):
        self.helper = type('ndarray', (), {'__module__': 'numpy', 'text': [int(token) for token in tokens]})()


FITTED = {Relative: 'C1 text order', RelativeLate: 'C1 text order', RelativeHalf: 'C1 text order',
          Forged: 'C1 read guard'}     # made from the text

CAUGHT = {
    **dict.fromkeys([Opens, Connects, Runs, Writes, Digs, Climbs, Waits, Declares, Maps, Patches, Unwinds,
                     Calls, Shares, SharesAnArray, SharesAnOldArray, SharesATensor, Pipes, PatchesOs,
                     FalseFile, ListsFolders, ListsByLibrary, MakesNodes, ReadsInCompiledCode,
                     ReadsByZipReader, ReadsMemory, AsksForFrames, CompilesAsLibrary], 'C1 isolation'),
    **dict.fromkeys([TextInAModule, TextInATuple, TextInBytes], 'C1 read guard'),
    **dict.fromkeys([PeeksFar, PeeksRemembering, PeeksAlone], 'C1 future flip'),
    **dict.fromkeys([Peeks, PeeksLast, PeeksLarge, PeeksLong, PeeksSeldom, FailsInCopies, AnswersOnce,
                     AvoidsTheMiddle, PeeksInAPool, PeeksFaintly], 'C1 target flip'),
    **dict.fromkeys([PeeksForSeven, KeyInAHelper], 'C2 enumeration'),
    **dict.fromkeys([Dice, GlobalDice, Clock], 'C1 same ledger twice'),
    **dict.fromkeys([Loose, Sure, Positive, OnlyTargets], 'C2 rows'),
    **dict.fromkeys([Secret, Silent, WarmingWeights], 'C3 declared state'),
    **dict.fromkeys([LearnsWhenSealed, Background], 'C3 frozen while scoring'),
    **dict.fromkeys([Stops, Dies], 'C4 each position once')}
