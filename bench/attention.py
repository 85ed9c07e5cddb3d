"Compiled causal attention on a CPU in bf16, forward and backward: the gain of each change, in turn."
import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from beside import write_record

from golf_nb.block import fused_attention
from golf_nb.kernels.attention import _AttentionByRuns
from golf_nb.kernels.memory import keep_memory
from golf_nb.kernels.tiles import load_tiles, tile_attention

def by_runs(q, k, v, mask='loaded', divide='shares', largest=True, runs=4):
    "The first version: blocks of queries, a stored mask, normalization by division; and its variants."
    (B, T, H, Dh), K = q.shape, k.shape[2]
    G, size = H//K, -(-T//runs)
    q = q.view(B, T, K, G, Dh).permute(0, 2, 3, 1, 4)
    k, v, outputs = k.transpose(1, 2), v.transpose(1, 2), []
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for lo in range(0, T, size):
        hi = min(lo + size, T)
        rows = q[..., lo:hi, :].reshape(B*K, G*(hi - lo), Dh)
        scores = torch.bmm(rows, k[:, :, :hi].reshape(B*K, hi, Dh).transpose(1, 2)).view(B*K, G, hi - lo, hi)
        scores = scores.float()*Dh**-0.5
        if mask == 'loaded': scores = scores.masked_fill(future[lo:hi, :hi], float('-inf'))
        else:
            at = torch.arange(hi, dtype=torch.int32)
            scores = torch.where(at <= at[lo:, None], scores, float('-inf'))
        e = torch.exp(scores - scores.detach().amax(-1, keepdim=True)) if largest else torch.exp(scores)
        total = e.sum(-1, keepdim=True)
        if divide == 'shares': e = e/total
        y = torch.bmm(e.to(q.dtype).view(B*K, -1, hi), v[:, :, :hi].reshape(B*K, hi, Dh))
        y = y.view(B*K, G, hi - lo, Dh)
        outputs.append((y/total).to(q.dtype) if divide == 'output' else y)
    return torch.cat(outputs, dim=2).view(B, K, G, T, Dh).permute(0, 3, 1, 2, 4).reshape(B, T, H, Dh)


VARIANTS = {                       # name: function, kept?
    "torch's kernel": (fused_attention, 'no'),
    'runs of queries, mask read, shares divided': (by_runs, 'at first'),
    'mask computed': (partial(by_runs, mask='computed'), 'yes'),
    'outputs divided instead of shares': (partial(by_runs, mask='computed', divide='output'), 'yes'),
    'no maximum subtracted': (partial(by_runs, mask='computed', divide='output', largest=False),
                              'no: overflows where scores exceed 88'),
    'eight runs instead of four': (partial(by_runs, mask='computed', divide='output', runs=8),
                                   'no: compiles for longer'),
    'way back written out': (_AttentionByRuns.apply, 'yes'),
}
if load_tiles(): VARIANTS['tiles'] = tile_attention, 'yes, where the processor has them'


def seconds(attend, parts):
    "Time a forward and a backward pass."
    begin = time.perf_counter()
    y = attend(*parts)
    half = time.perf_counter()
    y.backward(torch.ones_like(y))
    return half - begin, time.perf_counter() - half


def main():
    "Print a table; the rounds of all variants are interleaved."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--shape', type=int, nargs=5, default=(16, 512, 8, 4, 32), help='B T H K Dh')
    parser.add_argument('--out', type=Path, help='write a record')
    chosen = parser.parse_args()
    keep_memory()
    B, T, H, K, Dh = chosen.shape
    parts = [torch.randn(B, T, heads, Dh, dtype=torch.bfloat16, requires_grad=True) for heads in (H, K, K)]
    exact = fused_attention(*(part.detach().float() for part in parts))
    compiled = {name: attend if attend is fused_attention else torch.compile(attend, dynamic=False)
                for name, (attend, _) in VARIANTS.items()}
    errors = {name: (attend(*parts) - exact).abs().max().item() for name, attend in compiled.items()}
    first = {name: sum(seconds(attend, parts)) for name, attend in compiled.items()}   # compiles backward
    rows = {name: [] for name in VARIANTS}
    for _ in range(chosen.rounds):
        for name, attend in compiled.items(): rows[name].append(seconds(attend, parts))
    print(f'{"B x T x H/K x Dh":45} {f"{B} x {T} x {H}/{K} x {Dh}":>24}')
    print(f'{"":45} {"forward":>11} {"backward":>12} {"error":>8}  kept?')
    for name, times in rows.items():
        there, back = (1000*statistics.median(column) for column in zip(*times, strict=True))
        print(f'{name:45} {there:8.1f} ms {back:9.1f} ms {errors[name]:8.0e}  {VARIANTS[name][1]}')
    if chosen.out:
        kept = {name: kept for name, (_, kept) in VARIANTS.items()}
        write_record(chosen.out, shape=chosen.shape, seconds=rows, errors=errors, kept=kept, first=first,
                     threads=torch.get_num_threads())


if __name__ == '__main__': main()
