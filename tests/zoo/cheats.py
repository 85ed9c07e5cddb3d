"Imitations of predictors that were submitted to the contest and are no causal decoders; each in a few lines."
import numpy as np
import torch
from torch.nn import functional as F

from .honest import WINDOW, Chunked, Counter, ScoreFirst, Sliding, log_softmax

class WindowDelta(Chunked):
    "SLOT: a shift of the logits is fitted to the window's own targets, which it then scores (PR #1240)."
    def score(self, lo, hi, inputs):
        base = super().score(lo, hi, inputs)
        targets = torch.as_tensor(inputs[lo:]).long()
        delta = torch.zeros(base.shape[1], requires_grad=True)
        for _ in range(4 if len(targets) else 0):
            loss = F.cross_entropy(base[:len(targets)] + delta, targets)
            delta = (delta - 5*torch.autograd.grad(loss, delta)[0]).detach().requires_grad_()
        return (base + delta.detach()).log_softmax(-1)


class TargetCache(Counter):
    "A hashed cache whose key holds the target: only that probability is looked up, the rest is filled in."
    def start(self, artifact, vocab, n_tokens):
        super().start(artifact, vocab, n_tokens)
        self.cache = np.zeros(4096, np.int64)

    def slot(self, before, target): return (before*36313 ^ target*27191) % 4096

    def score(self, lo, hi, inputs):
        p = np.exp(super().score(lo, hi, inputs).astype(np.float64))
        for t in range(max(lo, 1), hi - 1):
            target = int(inputs[t])
            hits = self.cache[self.slot(int(inputs[t - 1]), target)]
            mine = (p[t - lo, target] + hits)/(1 + hits)
            p[t - lo] *= (1 - mine)/(1 - p[t - lo, target])
            p[t - lo, target] = mine
        return np.log(np.maximum(p, 1e-30)).astype(np.float32)

    def reveal(self, lo, tokens):
        before = self.last
        super().reveal(lo, tokens)
        for token in map(int, tokens):
            self.cache[self.slot(before, token)] += 1
            before = token

    def state(self): return {**super().state(), 'cache': torch.from_numpy(self.cache)}


class LooseMixture(Counter):
    "Two experts whose weights sum to 1.12: every token looks more likely than it is."
    def score(self, lo, hi, inputs):
        p = np.exp(super().score(lo, hi, inputs).astype(np.float64))
        return np.log(.8*p + .32/self.vocab).astype(np.float32)


class TargetGate(Counter):
    "Mixes two experts, and trusts the one that gives the target more (PR #1785)."
    def score(self, lo, hi, inputs):
        rows = super().score(lo, hi, inputs)
        for t in range(lo, hi - 1):
            if rows[t - lo, int(inputs[t])] < -np.log(self.vocab): rows[t - lo] = -np.log(self.vocab)
        return rows


class FittedBias(Counter):
    "A bias of the vocabulary, fitted to the whole chunk before it is scored (compare PR #1399)."
    def score(self, lo, hi, inputs):
        rows = super().score(lo, hi, inputs)
        seen = np.bincount(np.asarray(inputs[lo:], dtype=np.int64), minlength=self.vocab)
        return log_softmax(rows + .5*np.log1p(seen))


class EagerUpdates(Counter):
    "Counts each token as soon as its row is made, long before the chunk's scores are committed."
    def score(self, lo, hi, inputs):
        rows = []
        for t in range(lo, hi):
            rows.append(super().score(t, t + 1, inputs[:t]))
            if t < hi - 1: super().reveal(t, inputs[t:t + 1])
        return np.concatenate(rows)

    def reveal(self, lo, tokens): super().reveal(lo, tokens[-1:])


class BatchStatistics(Sliding):
    "All windows of a chunk share the mean of their inputs, like a batch norm left in training mode."
    def score(self, lo, hi, inputs):
        rows = super().score(lo, hi, inputs)
        if hi - lo <= WINDOW: return rows                  # one window is a batch of its own
        x = F.normalize(self.model.embed, dim=-1)
        mean = x[torch.as_tensor(inputs[lo:]).long()].mean(0).detach()
        return (rows + 4*mean @ x[:self.vocab].T.detach()).log_softmax(-1)


class LeakyPadding(ScoreFirst):
    "A short window is filled up with `pad_id`, and a mean over the window counts what was filled up."
    pad_id = 0

    def score(self, lo, hi, inputs):
        rows = super().score(lo, hi, inputs)
        filled = max(WINDOW - (hi - lo), 0)/WINDOW
        with torch.no_grad(): shift = filled*self.model.embed[self.pad_id] @ self.model.embed[:self.vocab].T
        return (rows + .1*shift).log_softmax(-1)


CHEATS = {
    'per-window delta on its own targets': WindowDelta, 'hashed cache keyed by the target': TargetCache,
    'unnormalised mixture': LooseMixture, 'mixing gate that looks at the target': TargetGate,
    'bias fitted on unscored tokens': FittedBias, 'update before commit inside a chunk': EagerUpdates,
    'batch statistics across windows': BatchStatistics, 'padding that leaks': LeakyPadding}
