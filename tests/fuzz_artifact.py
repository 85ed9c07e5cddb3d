"""Change valid artifacts at random, and check what `load` does with them.

    python tests/fuzz_artifact.py --cases 100000 --out results/fuzz/artifact.json

Each changed file must load to the same tensors, or be refused with an `ArtifactError` of one line; if its
checksum was made right again, it may also load to other tensors, if these are what its header declares.
Nothing may be run on the way (an audit hook watches), and memory must stay below four times what the good
file takes; of spliced files, the larger of the two that they are made from.
"""
import argparse
import hashlib
import json
import math
import os
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter, defaultdict
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from golf_nb.artifact import MAGIC, load, read_header, save
from golf_nb.codecs import CODECS, ArtifactError
from golf_nb.quant import Codes, Grid, convert

RUNS_CODE = ('exec', 'compile', 'import', 'os.system', 'os.exec', 'os.posix_spawn', 'subprocess.Popen',
             'pickle.find_class', 'socket.connect', 'ctypes.dlopen', 'marshal.loads')
NASTY = [-1, 0, 1, 2, 7, 8, 9, 16, 255, 2**28, 2**31, 2**63, 10**40, -2**63, 1.5, -0.0, 1e300, True, False,
         None, '', 'x', 'codes', 'steps', 'values', 'float16', 'float32', 'int8', '\ud800', 'a\nb', '../x',
         'x'*300, [], [[]], {}, {'': 0}, *CODECS]
watched = {'on': False, 'seen': []}


def watch(event, arguments):
    "Note what would run code while a file is loaded."
    if watched['on'] and event.startswith(RUNS_CODE): watched['seen'].append(f'{event} {str(arguments):.80}')


# --- good files ------------------------------------------------------------------------------------------

def tensors():
    "A small artifact with all that there can be."
    seeded = torch.Generator().manual_seed(0)
    def randn(*shape): return torch.randn(shape, generator=seeded)
    twins = 1 + 0.01*randn(24, 24)
    state = {
        'embed': torch.cat([twins[:12], randn(100, 24) + randn(100, 1)*randn(1, 24), twins[12:]]),
        'blocks.0.q': torch.linalg.qr(randn(48, 48))[0],
        'blocks.0.up': randn(96, 24),
        'blocks.0.down': randn(24, 96)*torch.logspace(-1, 1, 96),
        'cond.q_gain': randn(3, 4),
    }
    plan = {name: Grid(8 if name == 'embed' else 6, 'std', 12.85) for name in state} | {'cond.q_gain': None}
    one = Codes(torch.tensor([[-32, 31]], dtype=torch.int8), torch.tensor(0.1), 6, low=True)
    return plan, convert(state, plan) | {'control': randn(7), 'one': one}


def good_files(folder):
    "Files of the same tensors with different codecs and layouts."
    plan, stored = tensors()
    ways = [('auto', 'tensor'), ('shuffle+zstd', 'group'), ('bits+lzma', 'tensor'), ('brotli', 'tensor'),
            ('entropy+follow256', 'tensor'), ('auto', 'group'), ('bits', 'group'), ('zlib', 'tensor')]
    for codec, layout in ways:
        save(folder/'good', stored, {'a': [1, {'b': None}]}, plan, codec, layout)
        yield (folder/'good').read_bytes()


def take_apart(content):
    "Header and streams of a good file."
    length, = struct.unpack('<I', content[8:12])
    header, at = json.loads(content[12:12 + length]), 12 + length
    streams = []
    for stream in header['streams']:
        streams.append(content[at:at + stream['bytes']])
        at += stream['bytes']
    return header, streams


def put_together(header, streams):
    "The bytes of a file, without its checksum."
    text = json.dumps(header).encode()
    return MAGIC + struct.pack('<I', len(text)) + text + b''.join(streams)


# --- changes: each takes a good file and gives a body without checksum -----------------------------------

def flip(rng, content, others):
    "Flip some bits anywhere."
    body = bytearray(content[:-32])
    for _ in range(rng.choice([1, 1, 2, 8])): body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
    return bytes(body)


def flip_stream(rng, content, others):
    "Flip some bits of the streams, or overwrite a few bytes."
    length, = struct.unpack('<I', content[8:12])
    body = bytearray(content[:-32])
    for _ in range(rng.choice([1, 1, 2, 8])):
        body[rng.randrange(12 + length, len(body))] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(body)


def cut(rng, content, others):
    "Cut the file somewhere, or let it go on; a cut in the streams is sometimes declared."
    body = content[:-32]
    kind = rng.randrange(4)
    if kind == 0: return body[:rng.randrange(len(body))]
    if kind == 1: return body + rng.randbytes(rng.choice([1, 4, 100]))
    header, streams = take_apart(content)
    i = rng.randrange(len(streams))
    if kind == 2: streams[i] = streams[i][:rng.randrange(len(streams[i]) + 1)]
    else: streams[i] += rng.randbytes(rng.choice([1, 4, 100]))
    header['streams'][i]['bytes'] = len(streams[i])
    return put_together(header, streams)


def places(node, found):
    "All (container, key) of a JSON value."
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        found.append((node, key))
        if isinstance(node[key], dict | list): places(node[key], found)
    return found


def edit(rng, node, key):
    "Change one place of a header."
    value, kind = node[key], rng.randrange(6)
    if kind == 0 and type(value) is int: node[key] = value + rng.choice([-1, 1, -value, value, 7, 64])
    elif kind == 1 and type(value) is int: node[key] = max(1, int(value*rng.choice([0.5, 2, 3, 100, 1e6])))
    elif kind == 2 and isinstance(node, list): node.insert(rng.randrange(len(node) + 1), deepcopy(value))
    elif kind == 2: node[rng.choice(['x', 'bits', 'shape', 'low', 'dtype'])] = value
    elif kind == 3: del node[key]
    elif kind == 4 and isinstance(value, list): rng.shuffle(value)
    else: node[key] = rng.choice(NASTY)


def edit_header(rng, content, others):
    "Change some places of the header; it stays JSON."
    header, streams = take_apart(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        spots = places({'all': [header['tensors'], header['streams']] if rng.random() < 0.9 else header}, [])
        edit(rng, *rng.choice(spots[2:] or spots))
        if not all(isinstance(header.get(key), list) for key in ('tensors', 'streams')): break
    return put_together(header, streams)


def lie(rng, content, others):
    "Lie about lengths: of the header, of streams at the cost of others, of shapes."
    header, streams = take_apart(content)
    kind = rng.randrange(4)
    if kind == 0:
        body = bytearray(content[:-32])
        length = rng.choice([0, 1, 2**20, 2**32 - 1, rng.randrange(2**32), rng.randrange(3000)])
        body[8:12] = struct.pack('<I', length)
        return bytes(body)
    if kind == 1:
        a, b = rng.choices(header['streams'], k=2)
        moved = rng.choice([1, 4, rng.randrange(1, 1 + b['bytes'] + 4)])
        a['bytes'] += moved
        b['bytes'] -= moved
        return put_together(header, streams)
    tensor = rng.choice([tensor for tensor in header['tensors'] if len(tensor['shape']) == 2])
    rows, columns = tensor['shape']
    same_size = [[columns, rows], [rows*2, columns//2], [rows//2, columns*2], [rows*columns, 1]]
    if kind == 2: tensor['shape'] = rng.choice(same_size)
    else: tensor['shape'] = [int(rows*rng.choice([1, 2, 10, 1e4])), int(columns*rng.choice([1, 2, 10, 1e4]))]
    if tensor.get('steps', [])[1:]: tensor['steps'][1] = tensor['shape'][0]
    return put_together(header, streams)


def splice(rng, content, others):
    "Exchange, repeat, or replace streams; take them from the next file, with or without their codec."
    header, streams = take_apart(content)
    other_header, other_streams = take_apart(others[(others.index(content) + 1) % len(others)])
    i, j = rng.randrange(len(streams)), rng.randrange(len(other_streams))
    kind = rng.randrange(5)
    if kind == 0: streams[i], streams[0] = streams[0], streams[i]
    elif kind == 1: streams[i] = other_streams[j]
    elif kind == 2: streams[i] = rng.randbytes(rng.choice([0, 4, len(streams[i])]))
    elif kind == 3:
        streams[i] = other_streams[j]
        header['streams'][i]['codec'] = other_header['streams'][j]['codec']
    else: streams[i] = streams[i] + other_streams[j]
    if rng.random() < 0.9:
        for stream, piece in zip(header['streams'], streams, strict=True): stream['bytes'] = len(piece)
    return put_together(header, streams)


CHANGES = {'bit flips': flip, 'damaged streams': flip_stream, 'cut or longer': cut,
           'header edits': edit_header, 'length lies': lie, 'spliced streams': splice}


# --- verdicts --------------------------------------------------------------------------------------------

def facts(parts):
    "An artifact as plain values."
    def one(part):
        if not isinstance(part, Codes): return part.dtype, part.shape, part.numpy().tobytes()
        return part.bits, part.low, *one(part.codes), *one(part.steps)
    return [(name, *one(part)) for name, part in parts.items()]


def as_declared(path, parts):
    "Are these the tensors that the header promises?"
    entries = read_header(path)['tensors']
    if [entry['name'] for entry in entries] != list(parts): return False
    for entry, part in zip(entries, parts.values(), strict=True):
        shape = list((part.codes if isinstance(part, Codes) else part).shape)
        if shape != entry['shape'] or isinstance(part, Codes) != ('bits' in entry): return False
        floats = part.steps if isinstance(part, Codes) else part
        kind, *rows = entry['steps'] if 'bits' in entry else [entry['dtype'], *shape]
        if str(floats.dtype) != f'torch.{kind}' or list(floats.shape) != rows: return False
        if not floats.isfinite().all(): return False
        if 'bits' in entry:
            exact = part.bits == entry['bits'] and part.low == entry['low'] and part.codes.dtype == torch.int8
            if not exact or part.codes.min() < part.bottom or part.codes.max() > part.top: return False
    return True


def attempt(path):
    "What loading gives: tensors, or the refusal, or a complaint."
    try: return load(path)
    except ArtifactError as error:
        return 'refused' if len(str(error).splitlines()) == 1 else f'message of several lines: {error!r:.200}'
    except BaseException as error:   # the panics of a library in another language are no Exception
        if isinstance(error, KeyboardInterrupt): raise
        return f'{type(error).__name__}: {error!s:.200}'


def watched_attempt(path):
    "An attempt, and the most memory that Python and numpy held for it."
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    watched.update(on=True, seen=[])
    try: given = attempt(path)
    finally: watched['on'] = False
    return given, tracemalloc.get_traced_memory()[1] - before


def verdict(path, resealed, honest, honest_peak):
    "What became of a file: 'same', 'refused', 'as declared', or a complaint; and its memory."
    given, peak = watched_attempt(path)
    if watched['seen']: return f'ran something: {watched["seen"][0]}', peak
    if peak > 4*honest_peak: return f'{peak} bytes of memory, the good file {honest_peak}', peak
    if isinstance(given, str): return given, peak
    if facts(given) == honest: return 'same', peak
    if not resealed: return 'loaded in spite of a wrong checksum', peak
    return 'as declared' if as_declared(path, given) else 'loaded, but not as declared', peak


def fuzz(cases, seconds=math.inf, seed=0):
    "Change files until one of the limits is reached, at least 400 times; the record."
    rng, outcomes, failures = random.Random(seed), defaultdict(Counter), []
    count, worst = 0, 0.
    sys.addaudithook(watch)
    tracemalloc.start()
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else None) as folder:
        path, contents = Path(folder)/'case', list(good_files(Path(folder)))
        often = [1 if 'follow' in str(content) else 4 for content in contents]    # those take longest to load
        honest, honest_peaks = facts(load(Path(folder)/'good')), []
        for content in contents:
            path.write_bytes(content)
            load(path)
            honest_peaks.append(watched_attempt(path)[1])
        ends = time.monotonic() + seconds
        while count < cases and (count < 400 or time.monotonic() < ends):
            which, = rng.choices(range(len(contents)), often)
            kind = rng.choice(list(CHANGES))
            resealed = rng.random() < 0.8
            body = CHANGES[kind](rng, contents[which], contents)
            path.write_bytes(body + (hashlib.sha256(body).digest() if resealed else contents[which][-32:]))
            honest_peak = honest_peaks[which]
            if kind == 'spliced streams':
                honest_peak = max(honest_peak, honest_peaks[(which + 1) % len(contents)])
            result, peak = verdict(path, resealed, honest, honest_peak)
            if result not in ('same', 'refused', 'as declared'):
                failures.append({'case': count, 'change': kind, 'what': result})
                result = 'failed'
            outcomes[kind].update({'files': 1, 'checksum right': int(resealed), result: 1})
            count, worst = count + 1, max(worst, peak/honest_peak)
    tracemalloc.stop()
    columns = ('files', 'checksum right', 'same', 'refused', 'as declared', 'failed')
    return {'cases': count, 'resealed': sum(row['checksum right'] for row in outcomes.values()),
            'failures': failures[:50], 'seed': seed, 'worst_memory': worst,
            'good_files': [{'bytes': len(content), 'peak': peak}
                           for content, peak in zip(contents, honest_peaks, strict=True)],
            'outcomes': {kind: {column: outcomes[kind][column] for column in columns} for kind in CHANGES}}


def main():
    "Run it and write the record."
    from golf_nb.report import circumstances
    parser = argparse.ArgumentParser(description='Change artifacts at random and load them.')
    parser.add_argument('--cases', type=int, default=1000)
    parser.add_argument('--seconds', type=float, default=math.inf)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, help='file for the record')
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all='ignore')
    started = time.monotonic()
    record = fuzz(chosen.cases, chosen.seconds, chosen.seed)
    record |= {'seconds': time.monotonic() - started, **circumstances()}
    print(json.dumps(record, indent=1))
    if chosen.out: chosen.out.write_text(json.dumps(record, indent=1) + '\n')
    sys.exit(bool(record['failures']))


if __name__ == '__main__': main()
