"Honest predictors, one of each kind that was accepted in the contest, small enough to audit in a second."
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


HONEST = {
    'plain chunked': Chunked, 'sliding': Sliding, 'score-first SGD': ScoreFirst,
    'Muon-style updates': Orthogonal, 'per-document adapters': Adapters,
    'prefix-only n-gram tilt': Tilted, 'bigram counter': Counter, 'uniform': Uniform}
