"""Measure what notebooks 13 and 14 draw: `python results/scoring/measure.py RUN_DIR` with a trained `tiny`.

It writes sliding.json and ttt.json beside itself, one entry a measurement; entries that are there are kept.
"""
import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from golf_nb.artifact import write_atomically
from golf_nb.config import TTTConfig
from golf_nb.data import get_dataset
from golf_nb.evaluate import load_model, sliding
from golf_nb.layers import DTYPES
from golf_nb.ttt import NOT_LEGAL, ValidationTraining, score_first, train_on_validation

HERE = Path(__file__).parent
SLIDING_TOKENS, TTT_TOKENS = 32_768, 49_152      # targets from the start of the validation text
SGD = TTTConfig('sgd', lr=0.03, chunk=2048, batch=8)
MUON = replace(SGD, update='muon', lr=0.002, momentum=0.)
LORA = replace(SGD, update='adapters', lr=0.003, chunk=512, epochs=1, cosine=False)


class Record:
    "A file of measurements by name."
    def __init__(self, path, about):
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {'about': about, 'runs': {}}

    def add(self, name, measure):
        "Measure, unless it is there already."
        if name in self.content['runs']: return self.content['runs'][name]
        begin = time.perf_counter()
        found = measure()
        self.content['runs'][name] = found | {'seconds': time.perf_counter() - begin}
        write_atomically(self.path, json.dumps(self.content, indent=1).encode())
        print(name, f"{found['bpb']:.4f}", f"{self.content['runs'][name]['seconds']:.0f} s", flush=True)
        return self.content['runs'][name]


def slid(model, tokens, table, window, stride, dtype):
    "Score by windows; nats by the tokens of context a target had, too."
    scores = sliding(model, tokens[:SLIDING_TOKENS + 1], window, stride, bytes=table, batch=8, dtype=dtype)
    context = scores.position - scores.window + 1
    edges = [1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513]
    place = np.digitize(context, edges) - 1
    return {'window': window, 'stride': stride, 'bpb': scores.bpb, 'edges': edges,
            'nats': [float(scores.nll[place == i].sum()) for i in range(len(edges) - 1)],
            'count': [int((place == i).sum()) for i in range(len(edges) - 1)]}


def adapted(model, tokens, table, config, dtype):
    "Score first, adapt, and see which weights moved."
    run = score_first(model, tokens[:TTT_TOKENS + 1], 256, 256, config, bytes=table, batch=8, dtype=dtype)
    start = dict(model.named_parameters())
    with torch.no_grad():
        moved = {name: float((p - start[name]).norm()/start[name].norm())
                 for name, p in run.model.named_parameters()}
    return {'config': asdict(config), 'bpb': run.bpb, 'chunk_nll': run.chunk_nll.tolist(),
            'chunk_bytes': run.chunk_bytes.tolist(), 'epochs': run.epochs, 'steps': len(run.steps),
            'moved': moved}


def variants(best):
    "What is measured beside the sweep of rates, whose best one it starts from."
    yield from ((f'sgd, {e} epochs', replace(best, epochs=e)) for e in (1, 6))
    yield from ((f'sgd, chunk {c}', replace(best, chunk=c)) for c in (512, 8192))
    yield 'sgd, no momentum', replace(best, momentum=0., lr=best.lr*10)
    yield 'sgd, no cosine', replace(best, cosine=False)
    for part, names in (('controls', ('cond.*', 'skips.*')), ('embed', ('embed',)), ('blocks', ('blocks.*',)),
                        ('looped blocks', ('blocks.1.*', 'blocks.2.*'))):
        yield from ((f'sgd, {part}, x{k}', replace(best, only=names, lr=best.lr*k)) for k in (1, 10))
    yield from ((f'muon {lr}', replace(MUON, lr=lr)) for lr in (0.0005, 0.002, 0.008, 0.02, 0.05))
    yield 'muon 0.008, chunk 512', replace(MUON, lr=0.008, chunk=512)
    yield 'muon 0.008, 1 epoch', replace(MUON, lr=0.008, epochs=1)
    yield 'muon 0.008, looped blocks', replace(MUON, lr=0.008, only=('blocks.1.*', 'blocks.2.*'))
    yield 'muon 0.008, outer blocks', replace(MUON, lr=0.008, only=('blocks.0.*', 'blocks.3.*'))
    yield 'muon 0.008, embed', replace(MUON, lr=0.008, only=('embed',))
    for kind in ('tied', 'visit'):
        yield from ((f'adapters, {kind}, {lr}', replace(LORA, adapters=kind, lr=lr)) for lr in (0.001, 0.004))
    yield 'adapters, visit, never anew', replace(LORA, adapters='visit', lr=0.001, per_document=False)


def main():
    "Measure everything that is missing."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path)
    folder = parser.parse_args().folder
    model, config = load_model(folder, artifact=True)
    data, dtype = get_dataset(config.data.source, config.model.vocab), DTYPES[config.precision]
    tokens, table = data.val_tokens(), data.byte_table
    about = {'preset': config.preset, 'seed': config.seed, 'torch': torch.__version__,
             'trained_context': config.data.seq_len}
    documents = np.flatnonzero(tokens[:TTT_TOKENS] == 1).tolist()
    record = Record(HERE/'ttt.json', about | {'tokens': TTT_TOKENS, 'documents': documents})
    plain = sliding(model, tokens[:TTT_TOKENS + 1], 256, 256, bytes=table, batch=8, dtype=dtype)
    chunks = plain.nll.reshape(-1, 2048).sum(1).tolist(), plain.token_bytes.reshape(-1, 2048).sum(1).tolist()
    record.add('plain', lambda: {'bpb': plain.bpb, 'chunk_nll': chunks[0], 'chunk_bytes': chunks[1]})
    def measure(name, chosen): return record.add(name, lambda: adapted(model, tokens, table, chosen, dtype))
    sweep = {lr: measure(f'sgd {lr}', replace(SGD, lr=lr))['bpb'] for lr in (0.003, 0.01, 0.03, 0.1, 0.3)}
    best = replace(SGD, lr=min(sweep, key=sweep.get))
    for name, chosen in variants(best): measure(name, chosen)
    record.add('trained on validation first', lambda: cheat(model, tokens, table, dtype))
    record = Record(HERE/'sliding.json', about | {'tokens': SLIDING_TOKENS})
    for window, stride in ((256, 256), (256, 128), (256, 64), (256, 32), (256, 16), (128, 128), (128, 32),
                           (64, 64), (64, 16), (32, 32), (16, 16), (512, 512), (512, 128)):
        record.add(f'{window}/{stride}', lambda w=window, s=stride: slid(model, tokens, table, w, s, dtype))


def cheat(model, tokens, table, dtype):
    "Three epochs of #1406's training on validation before scoring."
    text = tokens[:TTT_TOKENS + 1]
    chosen = ValidationTraining(lr=0.002, epochs=3, batch=8)
    trained, losses = train_on_validation(model, text, 256, chosen, dtype=dtype)
    scores = sliding(trained, text, 256, 256, bytes=table, batch=8, dtype=dtype)
    return {'notice': NOT_LEGAL, 'bpb': scores.bpb, 'losses': losses,
            'chunk_nll': scores.nll.reshape(-1, 2048).sum(1).tolist(),
            'chunk_bytes': scores.token_bytes.reshape(-1, 2048).sum(1).tolist()}


if __name__ == '__main__': main()
