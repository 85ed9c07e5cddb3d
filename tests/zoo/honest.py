"Honest predictors: one of each kind that was accepted, and others that an auditor could mistake."
import collections
import importlib.metadata
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

WINDOW = 16            # longest context, tokens


def log_softmax(rows):
    "Normalise rows of a numpy array."
    return (rows - np.logaddexp.reduce(rows, axis=1, keepdims=True)).astype(np.float32)


class Tiny(nn.Module):
    "A causal model of one attention layer."
    def __init__(self, vocab: int, dim: int = 16):
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        def matrix(*shape): return nn.Parameter(torch.randn(*shape, generator=draw)/shape[-1]**.5)
        self.embed, self.q = matrix(vocab + 1, dim), matrix(dim, dim)
        self.k, self.v = matrix(dim, dim), matrix(dim, dim)
        self.head = nn.Parameter(matrix(vocab, dim).detach()*.3)

    def forward(self, tokens: Tensor, low: Tensor | None = None) -> Tensor:
        x = F.normalize(self.embed[tokens], dim=-1)*4
        score = (x @ self.q.T) @ (x @ self.k.T).mT/x.shape[-1]**.5
        ahead = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
        x = x + score.masked_fill(ahead, -torch.inf).softmax(-1) @ (x @ self.v.T)
        return x @ (self.head if low is None else self.head + low).T


class Chunked:
    "Scores the text in blocks of `WINDOW` tokens; a block knows nothing of the one before."
    stride = WINDOW

    def start(self, artifact, vocab, n_tokens):
        self.vocab, self.model = vocab, Tiny(vocab)

    def window(self, t):
        "First token that row t may use."
        return max((t - WINDOW)//self.stride*self.stride + self.stride, 0) if t > WINDOW else 0

    def low(self, t, inputs): return None

    def score(self, lo, hi, inputs):
        start = torch.full((1,), self.vocab)                  # id V: nothing yet
        padded = torch.cat([start, torch.as_tensor(inputs).long()])       # row t is the output at index t
        rows = []
        with torch.no_grad():
            for t in range(lo, hi):
                begin = self.window(t)
                window = torch.zeros(WINDOW + 1, dtype=torch.long)        # of one shape, filled up with zeros
                window[:t + 1 - begin] = padded[begin:t + 1]
                rows.append(self.model(window, self.low(t, inputs))[t - begin].log_softmax(-1))
        return torch.stack(rows)

    def reveal(self, lo, tokens): pass
    def state(self): return dict(self.model.state_dict())


class Sliding(Chunked):
    "The same with overlapping windows."
    stride = 4


class ScoreFirst(Sliding):
    "Trains on each chunk by SGD with momentum, after it was scored."
    lr, momentum = .01, .9

    def start(self, artifact, vocab, n_tokens):
        super().start(artifact, vocab, n_tokens)
        self.seen = [vocab]
        self.speed = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}

    def direction(self, name, gradient):
        self.speed[name].mul_(self.momentum).add_(gradient)
        return self.speed[name]

    def reveal(self, lo, tokens):
        text = torch.tensor(self.seen[-1:] + [int(i) for i in tokens])
        loss = F.cross_entropy(self.model(text[:-1]), text[1:])
        names = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(loss, list(names.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(names.items(), gradients, strict=True):
                p.sub_(self.direction(name, gradient), alpha=self.lr)
        self.seen += text[1:].tolist()

    def state(self):
        return {**self.model.state_dict(), **{f'speed/{name}': v for name, v in self.speed.items()},
                'seen': torch.tensor(self.seen)}


class Orthogonal(ScoreFirst):
    "Trains with updates that are orthogonalised, as Muon does."
    lr = .02

    def direction(self, name, gradient):
        x = super().direction(name, gradient)
        x = x/(x.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
            b = -4.775*a + 2.0315*a @ a
            x = 3.4445*x + (b @ x if x.shape[0] <= x.shape[1] else x @ b)
        return x


class Adapters(Sliding):
    "A low-rank matrix beside the frozen head, trained on what is revealed; token 0 begins a document."
    rank, lr = 2, .03

    def start(self, artifact, vocab, n_tokens):
        super().start(artifact, vocab, n_tokens)
        self.model.requires_grad_(False)
        self.before = vocab
        self.reset()

    def reset(self):
        draw = torch.Generator().manual_seed(1)
        self.a = torch.randn(self.rank, 16, generator=draw)/4
        self.b = torch.zeros(self.vocab, self.rank)

    def score(self, lo, hi, inputs):
        self.lo = lo
        return super().score(lo, hi, inputs)

    def low(self, t, inputs):
        "The adapter of row t: that of its document, if this chunk's tokens before t do not begin a new one."
        new = any(int(i) == 0 for i in inputs[self.lo:t])
        return None if new else self.b @ self.a

    def reveal(self, lo, tokens):
        for token in map(int, tokens):
            if token == 0: self.reset()
            a, b = self.a.requires_grad_(), self.b.requires_grad_()
            loss = F.cross_entropy(self.model(torch.tensor([self.before]), b @ a), torch.tensor([token]))
            ga, gb = torch.autograd.grad(loss, [a, b])
            self.a, self.b = (a - self.lr*ga).detach(), (b - self.lr*gb).detach()
            self.before = token

    def state(self):
        return {**self.model.state_dict(), 'a': self.a, 'b': self.b, 'before': b'%d' % self.before}


class Counter:
    "Bigram counts with add-half smoothing."
    def start(self, artifact, vocab, n_tokens):
        self.vocab, self.last, self.counts = vocab, vocab, np.full((vocab + 1, vocab), .5)

    def score(self, lo, hi, inputs):
        before = [int(inputs[t - 1]) if t else self.vocab for t in range(lo, hi)]
        return log_softmax(np.log(self.counts[before]))

    def reveal(self, lo, tokens):
        for token in map(int, tokens):
            self.counts[self.last, token] += 1
            self.last = token

    def state(self): return {'counts': torch.from_numpy(self.counts), 'last': str(self.last).encode()}


class Tilted(Counter):
    "Counts, tilted to what followed the last two tokens before; p' = p exp(b [hint])/Z, exactly normalised."
    tilt = 1.5

    def start(self, artifact, vocab, n_tokens):
        super().start(artifact, vocab, n_tokens)
        self.hints, self.tail = {}, []

    def score(self, lo, hi, inputs):
        rows = super().score(lo, hi, inputs).astype(np.float64)
        for t in range(max(lo, 2), hi):
            hint = self.hints.get((int(inputs[t - 2]), int(inputs[t - 1])))
            if hint is not None:
                rows[t - lo] -= np.log1p(np.exp(rows[t - lo, hint])*np.expm1(self.tilt))
                rows[t - lo, hint] += self.tilt
        return rows.astype(np.float32)

    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        for token in map(int, tokens):
            if len(self.tail) == 2: self.hints[tuple(self.tail)] = token
            self.tail = [*self.tail, token][-2:]

    def state(self):
        return {**super().state(), 'hints': repr([sorted(self.hints.items()), self.tail]).encode()}


class Uniform:
    "Every token is as likely as every other."
    def start(self, artifact, vocab, n_tokens): self.vocab = vocab
    def score(self, lo, hi, inputs): return np.full((hi - lo, self.vocab), -np.log(self.vocab), np.float32)
    def reveal(self, lo, tokens): pass
    def state(self): return {}


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


class Convolution(Chunked):
    "Mixes embeddings by a causal convolution, computed by FFT over the whole chunk: exact but for rounding."
    def start(self, artifact, vocab, n_tokens):
        super().start(artifact, vocab, n_tokens)
        self.kernel = torch.exp(-torch.arange(64.)/8)
    def score(self, lo, hi, inputs):
        ids = torch.cat([torch.full((1,), self.vocab), torch.as_tensor(np.asarray(inputs)).long()])
        x = F.normalize(self.model.embed.detach()[ids], dim=-1)
        size = 2*len(x) + 64
        kernel = torch.fft.rfft(self.kernel, size)[:, None]
        mixed = torch.fft.irfft(torch.fft.rfft(x, size, 0)*kernel, size, 0)
        return (2*mixed[lo:hi] @ self.model.embed.detach()[:-1].T).log_softmax(-1)


class Pool(Counter):
    "Has a pool of threads from the beginning."
    def start(self, *facts):
        super().start(*facts)
        self.pool = ThreadPoolExecutor(2)
    def score(self, lo, hi, inputs):
        parts = [(lo, (lo + hi)//2), ((lo + hi)//2, hi)]
        def work(part): return Counter.score(self, *part, inputs[:part[1] - 1])
        return np.concatenate(list(self.pool.map(work, parts)))


class PoolEachTime(Counter):
    "Makes a pool for each question."
    def score(self, lo, hi, inputs):
        with ThreadPoolExecutor(2) as pool: return pool.submit(super().score, lo, hi, inputs).result()


class Parallel(Sliding):
    "Lets torch compute in two threads."
    def start(self, *facts):
        torch.set_num_threads(2)
        super().start(*facts)


class Remembers(Counter):
    "Keeps its answers, by all that they depend on."
    def start(self, *facts):
        super().start(*facts)
        self.kept = {}
    def score(self, lo, hi, inputs):
        key = lo, hi, bytes(int(i) for i in inputs), self.counts.tobytes()
        if key not in self.kept: self.kept[key] = super().score(lo, hi, inputs)
        return self.kept[key]


class History(Counter):
    "Predicts what followed the longest match in its own history; inputs continue the history."
    def start(self, artifact, vocab, n_tokens):
        super().start(artifact, vocab, n_tokens)
        self.history = []
    def score(self, lo, hi, inputs):
        ids = [*self.history, *(int(i) for i in inputs[lo:])]
        rows = super().score(lo, hi, inputs).astype(np.float64)
        for t in range(lo, hi):
            for size in (4, 3, 2):
                ends = [i for i in range(size, t) if ids[i - size:i] == ids[t - size:t]] if t > size else []
                if ends:
                    rows[t - lo, ids[ends[-1]]] += size
                    break
        return log_softmax(rows)
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        self.history += map(int, tokens)
    def state(self): return {**super().state(), 'history': self.history}


class Cautious(Counter):
    "Looks at its options: the environment, a version, the clock, random numbers that do not matter."
    def start(self, *facts):
        super().start(*facts)
        self.debug, self.begun = os.environ.get('DEBUG', ''), time.monotonic()
        self.draw = np.random.default_rng().random(3)
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        self.spent = time.monotonic() - self.begun


class Progress(Counter):
    "Shows a bar, whose lock is shared memory."
    def reveal(self, lo, tokens): super().reveal(lo, np.array([int(i) for i in tqdm(tokens)]))


class Warm(Counter):
    "SGD with momentum and a warm-up, all of it declared."
    def start(self, *facts):
        super().start(*facts)
        self.speed, self.times = np.zeros(self.vocab), 0
    def reveal(self, lo, tokens):
        super().reveal(lo, tokens)
        counts = np.bincount([int(token) for token in tokens], minlength=self.vocab)
        self.speed, self.times = .9*self.speed + counts/len(tokens), self.times + 1
        if self.times > 4: self.counts = self.counts + .1*self.speed
    def state(self): return {**super().state(), 'speed': self.speed, 'times': self.times}


OTHERS = [InContext, Recurrent, Cached, Queue, TorchInputs, NeedsOne, Indexes, Strict, Doubles, Lists, Lazy,
          Bounded, Module, Padded, Seeded, Unpicklable, Pool, PoolEachTime, Parallel, Remembers, History,
          Cautious, Progress, Warm]
ROUNDING = [Convolution]        # rows that differ in their last digits: undecided, and no more


HONEST = {
    'plain chunked': Chunked, 'sliding': Sliding, 'score-first SGD': ScoreFirst,
    'Muon-style updates': Orthogonal, 'per-document adapters': Adapters,
    'prefix-only n-gram tilt': Tilted, 'bigram counter': Counter, 'uniform': Uniform}
