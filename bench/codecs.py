"""Bytes and seconds of every codec.

    python bench/codecs.py                      save and load 16 MB of codes like those of loop3 at full scale
    python bench/codecs.py RUN [RUN ..]         all codecs on the trained weights of runs, one record each
    python bench/codecs.py --out results/codes  ... and write the records
"""
import argparse
import json
import resource
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from golf_nb.artifact import load, read_header, save
from golf_nb.codecs import CODECS, ENTROPY, Part, decoder_bytes, entropy_bits
from golf_nb.config import QuantConfig
from golf_nb.model import build
from golf_nb.presets import get
from golf_nb.quant import Codes, convert, plan_grids
from golf_nb.report import circumstances, read_log

RULE = {'bits': 6, 'embed_bits': 8, 'scale': 'std', 'clip_k': 12.85, 'embed_clip_k': 20.}    # of #1493


def codec_sizes(coded):
    "Measure the bytes of all codes with each codec, with a stream per tensor and a stream per kind."
    kinds = defaultdict(list)
    for name, part in coded.items(): kinds[name.split('.')[-1]].append(part)
    groups = {'tensor': [[part] for part in coded.values()], 'group': list(kinds.values())}
    sizes = {}
    for name, codec in CODECS.items():
        if codec.work(Part('int8', (64, 64))): continue    # predictions are for chosen matrices: see 'ours'
        def size(group, codec=codec):
            parts = [Part('int8', tuple(part.codes.shape), part.bits, part.low) for part in group]
            return len(codec.pack([part.codes.numpy() for part in group], parts))
        sizes[name] = {layout: sum(map(size, found)) for layout, found in groups.items()}
        print(f'{name:20}', *(f'{layout} {value:>12,}' for layout, value in sizes[name].items()), flush=True)
    return sizes


def measure(run, out):
    "Measure all codecs on the weights of a run, with #1493's rule."
    config = json.loads((run/'config.json').read_text())
    state = load_file(run/'checkpoint'/'weights.safetensors')
    plan = plan_grids(state.items(), QuantConfig(**RULE, min_numel=config['quant']['min_numel']))
    stored = convert(state, plan)
    coded = {name: part for name, part in stored.items() if isinstance(part, Codes)}
    kept = out if out and config['preset'] == 'tiny' else Path(tempfile.mkdtemp())   # others are large
    path = kept/f'{config["preset"]}.golf'
    start = time.perf_counter()
    total = save(path, stored, {'preset': config['preset'], 'rule': RULE}, plan)
    saved = time.perf_counter()
    load(path)
    loaded = time.perf_counter()
    bounds = {name: entropy_bits(part.codes)*part.codes.numel()/8 for name, part in coded.items()}
    streams = read_header(path)['streams']
    names = [entry['name'] for entry in read_header(path)['tensors']]
    spent = {names[s['tensors'][0]]: s for s in streams if s['holds'] == 'codes'}
    kinds = defaultdict(lambda: [0., 0])
    for name, bound in bounds.items():
        kind = kinds[name.split('.')[-1]]
        kind[0] += bound
        kind[1] += spent[name]['bytes']
    return {
        **{key: config[key] for key in ('preset', 'scale', 'steps', 'seconds', 'seed')},
        'trained_steps': max(line.get('step', 0) for line in read_log(run/'log.jsonl')), 'rule': RULE,
        'codes': sum(part.codes.numel() for part in coded.values()), 'bound': sum(bounds.values()),
        'ours': {'coded': sum(s['bytes'] for s in spent.values()), 'decoder': decoder_bytes()},
        'step_bytes': sum(s['bytes'] for s in streams if s['holds'] == 'steps'), 'file': total,
        'save_seconds': saved - start, 'load_seconds': loaded - saved,
        'kinds': kinds, 'chosen': {name: s['codec'] for name, s in spent.items()},
        'codecs': codec_sizes(coded), **circumstances()}


def speed():
    "Time saving and loading as many Gaussian weights as loop3 has at full scale, on one core."
    model = build(get('loop3', 'full').model, device='meta')
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    plan = plan_grids(state.items(), QuantConfig(**RULE, min_numel=65536))
    stored = convert(state, plan)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'model.golf'
        start = time.process_time()
        size = save(path, stored, {}, plan)
        saved = time.process_time()
        load(path)
        loaded = time.process_time()
        codecs = sorted({stream['codec'] for stream in read_header(path)['streams']})
    codes = sum(part.codes.numel() for part in stored.values() if isinstance(part, Codes))
    return {'bytes': size, 'codes': codes,
            'save_seconds': saved - start, 'load_seconds': loaded - saved, 'codecs': codecs,
            'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, **circumstances()}


def main():
    "Measure, print, and write the requested records."
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='*', type=Path, help='run directories')
    parser.add_argument('--out', type=Path, help='folder for records')
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    records = [measure(run, chosen.out) for run in chosen.runs] or [speed()]
    for record in records:
        name = record.get('preset', 'speed')
        print(name, json.dumps({key: record[key] for key in list(record)[:12] if key != 'codecs'}, indent=1))
        if chosen.out: (chosen.out/f'{name}.json').write_text(json.dumps(record, indent=1) + '\n')
    if 'ours' in record:
        print(', '.join(sorted(set(ENTROPY) & set(record['chosen'].values()))))


if __name__ == '__main__': main()
