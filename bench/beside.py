"The baseline of every measurement: the rate of plain matrix products on this machine, at the same time."
import json
import time

import torch
import torch.nn.functional as F

from golf_nb.layers import computes_bf16

SHAPES = (4096, 256, 1024), (4096, 512, 512)  # rows, columns in, columns out
DTYPE = torch.bfloat16 if computes_bf16('cpu') else torch.float32   # of all measurements


def _rate(shape, dtype, seconds):
    rows, inner, outer = shape
    x, w = torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)
    F.linear(x, w)
    count, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < seconds:
        F.linear(x, w)
        count += 1
    return 2*rows*inner*outer*count/passed


def matrix_rate(dtype=DTYPE, seconds=0.3):
    "Mean FLOP per second of two matrix products."
    return sum(_rate(shape, dtype, seconds) for shape in SHAPES)/len(SHAPES)


def write_record(path, **content):
    "Write the measurements, with machine, versions, and commit."
    from golf_nb.report import circumstances
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | circumstances(), indent=1) + '\n')
