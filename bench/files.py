"Time from weights to a file, per million weights: GPTQ, Hessians, and coding, each against a plain version."
import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from beside import write_record

from golf_nb.codecs import CODECS, Part
from golf_nb.config import Calibration
from golf_nb.gptq import READERS, collect_hessians, compensated_codes, feedback
from golf_nb.model import build
from golf_nb.presets import get
from golf_nb.quant import Grid, convert, row_steps

GRID = Grid(6, 'std', clip_k=12.85)


def weights(size, seed=0):
    "Make a matrix, and a Hessian of correlated inputs."
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4*size, size, generator=generator) @ torch.diag(torch.arange(1, size + 1)**-0.5)
    x = x + 0.1*torch.randn(4*size, size, generator=generator)
    return torch.randn(size, size, generator=generator), x.T @ x


def gptq(size=1024):
    "Compare blocked feedback with feedback to all later columns after each column."
    w, hessian = weights(size)
    steps, blocked = row_steps(w, GRID), feedback(hessian, Calibration())
    plain = replace(blocked, block=size)
    def run(inputs): return compensated_codes(w, steps, GRID, inputs)
    assert (run(blocked) == run(plain)).float().mean() > 0.999          # a different order of summation
    return 'GPTQ, columns in blocks', w.numel(), lambda: run(blocked), lambda: run(plain)


def hessians(preset='loop3', rows=8, length=512):
    "Compare one sum for matrices that share an input with one per matrix and visit."
    model = build(get(preset).model).eval()
    tokens = torch.randint(model.config.vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    schedule, readers = model.config.schedule, READERS
    def plain():
        sums = {}
        def hook(v, name, x):
            x = x.detach().reshape(-1, x.shape[-1])
            for matrix in readers.get(name, ()):
                key = f'blocks.{schedule[v].block}.{matrix}'
                sums[key] = sums.get(key, 0) + x.T @ x
        with torch.no_grad(): model(tokens, hook=hook)
        return sums
    ours, theirs = collect_hessians(model, [tokens]), plain()
    for name, found in theirs.items(): torch.testing.assert_close(ours[name], found, rtol=1e-3, atol=1e-2)
    count = sum(p.numel() for name, p in model.named_parameters() if name in theirs)
    return f'Hessians of {rows*length:,} tokens', count, lambda: collect_hessians(model, [tokens]), plain


def coding(size=1024):
    "Compare the entropy coder with brotli on shuffled bytes, the best general codec."
    w, _ = weights(size)
    codes = convert({'w': w}, {'w': GRID})['w']
    array = codes.codes.numpy()
    part = Part('int8', array.shape, codes.bits, codes.low)
    ours, theirs = (CODECS[name].pack([array], [part]) for name in ('entropy', 'shuffle+brotli'))
    print(f'{len(ours):,} bytes beside {len(theirs):,}')
    for name, content in (('entropy', ours), ('shuffle+brotli', theirs)):
        assert (CODECS[name].unpack(content, [part])[0] == array).all()
    def pack(name): return lambda: CODECS[name].pack([array], [part])
    def unpack(name, content): return lambda: CODECS[name].unpack(content, [part])
    yield 'coding, against brotli-11', w.numel(), pack('entropy'), pack('shuffle+brotli')
    rivals = unpack('entropy', ours), unpack('shuffle+brotli', theirs)
    yield 'decoding, against brotli', w.numel(), *rivals


def main():
    "Print seconds per million weights, and the ratio to the plain version."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--out', type=Path, help='write a record')
    chosen = parser.parse_args()
    records = []
    print(f'{"":30} {"s per million weights":>22} {"plain":>8} {"times as fast":>14}')
    for name, count, ours, plain in (gptq(), hessians(), *coding()):
        rows = []
        for _ in range(chosen.rounds):
            begin = time.perf_counter()
            ours()
            half = time.perf_counter()
            plain()
            rows.append((half - begin, time.perf_counter() - half))
        a, b = (1e6*statistics.median(column)/count for column in zip(*rows, strict=True))
        print(f'{name:30} {a:22.3f} {b:8.3f} {b/a:14.2f}', flush=True)
        records.append({'name': name, 'weights': count, 'seconds': rows})
    if chosen.out: write_record(chosen.out, records=records, threads=torch.get_num_threads())


if __name__ == '__main__': main()
