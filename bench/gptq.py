"Time and memory of GPTQ at full scale: `loop3` with random weights and synthetic Hessians."
import argparse
import json
import resource
import time
from pathlib import Path

import torch

from golf_nb.config import Calibration
from golf_nb.gptq import feedback, quantize
from golf_nb.model import build, count_parameters
from golf_nb.presets import get
from golf_nb.quant import Codes, parameter_role
from golf_nb.report import circumstances

def mib():
    "Return the peak resident memory of this process, in MiB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**10


def synthetic(size, samples, generator):
    "Make a Hessian of correlated inputs, with a slowly decaying spectrum."
    x = torch.randn(samples, size, generator=generator) @ torch.diag(torch.arange(1, size + 1)**-0.5)
    x = x[:, torch.randperm(size, generator=generator)] + 0.1*torch.randn(samples, size, generator=generator)
    return x.T @ x


def main():
    "Measure, print, and write a record."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'results'/'gptq'/'full.json')
    parser.add_argument('--threads', type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    config, generator = get('loop3', 'full'), torch.Generator().manual_seed(0)
    model = build(config.model, seed=0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=generator)*0.02)
    hessians, shared = {}, {}
    for name, p in model.named_parameters():
        if parameter_role(name) != 'matrix' and name != 'embed': continue
        key = name[:-1] if name[-2:] in ('.q', '.k', '.v') else name     # q, k, and v read the same input
        if key not in shared: shared[key] = synthetic(p.shape[1], 4096, generator)
        hessians[name] = shared[key]
    held = sum(h.numel() for h in shared.values())*4/2**20
    before, at = mib(), time.perf_counter()
    stored = quantize(model, config.quant, hessians=hessians)
    seconds = time.perf_counter() - at
    coded = [part for part in stored.values() if isinstance(part, Codes)]
    at = time.perf_counter()
    for hessian in shared.values(): feedback(hessian, Calibration())
    record = {
        'parameters': count_parameters(model), 'matrices': len(coded), 'hessians': len(shared),
        'columns': sum(part.codes.shape[1] for part in coded),
        'seconds': round(seconds, 2), 'seconds_factors': round(time.perf_counter() - at, 2),
        'hessians_mib': round(held, 1), 'weights_mib': round(count_parameters(model)*4/2**20, 1),
        'before_mib': round(before, 1), 'peak_mib': round(mib(), 1), 'seed': 0, **circumstances(),
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(record, indent=1) + '\n')
    print(json.dumps(record, indent=1))


if __name__ == '__main__': main()
