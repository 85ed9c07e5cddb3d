"Imitations of run folders and submissions with which something is wrong. Each changes a sound one."
import base64
import json
import lzma
import shutil
import zlib
from pathlib import Path

import numpy as np

SCRIPTS = Path(__file__).parent/'scripts'


def edit(path, change):
    "Change a JSON file."
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def claim(folder, factor):
    "Let all files of a run report a better score."
    def scores(s):
        for name in ('pre_quant', 'post_quant', 'sliding', 'sliding_normalised'): s[name] *= factor
    edit(folder/'scores.json', scores)
    edit(folder/'report.json', lambda r: (scores(r['scored']), scores(r['bpb'])))


def two_passes(folder, seed):
    "All of the text is scored twice; what the second pass says is reported."
    rng = np.random.default_rng(seed)
    targets = json.loads((folder/'scores.json').read_text())['tokens']
    nll = rng.gamma(2., 1., 2*targets)
    nll[targets:] *= .7
    position = np.tile(np.arange(targets), 2)
    np.savez(folder/'ledger.npz', position=position, nll=nll, token_bytes=np.ones(2*targets, np.int64))
    claim(folder, .7)


def best_of_epochs(folder, seed):
    "The text is adapted to and scored in ten epochs; the best one is reported."
    rng = np.random.default_rng(seed)
    best = json.loads((folder/'report.json').read_text())['bpb']['sliding']
    scores = sorted(best*(1 + rng.uniform(.01, .2, 9)), reverse=True) + [best]
    with (folder/'log.jsonl').open('a') as log:
        for epoch, bpb in enumerate(scores):
            log.write(json.dumps({'ttt_epoch': epoch, 'val_bpb': bpb}) + '\n')


def space_twice(folder, seed):
    "Leading spaces are in the byte table, and are added once more at run time: a sixth more bytes."
    factor = 1.16 + .01*seed
    def more(s): s['bytes'], s['normalised_bytes'] = int(s['bytes']*factor), int(s['normalised_bytes']*factor)
    edit(folder/'scores.json', more)
    edit(folder/'report.json', lambda r: more(r['scored']))
    claim(folder, 1/factor)


def truncated(folder, seed):
    "Only the first part of the text is scored."
    def fewer(s): s['tokens'] = int(s['tokens']*(.9 - .2*seed))
    edit(folder/'scores.json', fewer)
    edit(folder/'report.json', lambda r: fewer(r['scored']))


def late_calibration(folder, seed):
    "Training ends on time; Hessians and GPTQ come after the clock was stopped."
    segments = {'compile': 90., 'steps': 599.4, 'hessians': 30. + 5*seed, 'gptq': 22.}
    edit(folder/'report.json', lambda r: r['cost'].update(train_seconds=599.4, segments=segments))


def too_large(folder, seed):
    "Three seeds; the artifact of one of them has more than 16,000,000 bytes."
    one = folder.parent/f'{folder.name}-one'
    folder.rename(one)
    for number in range(3):
        place = folder/f'seed-{number}'
        shutil.copytree(one, place)
        edit(place/'config.json', lambda c, n=number: c.update(seed=n))
        edit(place/'report.json', lambda r, n=number: (r['config'].update(seed=n), r.update(seed=n)))
        if number == seed:
            with (place/'model.golf').open('ab') as file: file.truncate(16_000_001 + seed)
            edit(place/'report.json', lambda r, s=seed: r['artifact'].update(total=16_000_001 + s))
    shutil.rmtree(one)


# --- submissions -------------------------------------------------------------------------------------------

def honest_source(): return (SCRIPTS/'honest.py').read_text()


def changed(source, old, new):
    "Replace what must be there."
    assert source.count(old) == 1, old
    return source.replace(old, new)


def train_first():
    "All validation tokens are trained on for six epochs; then the model is quantized and scored (PR #1406)."
    source = changed(honest_source(), 'def main(',
                     '''def adapt_before_quantization(args, model, val_tokens, epochs=6):
    optimizer = torch.optim.AdamW(model.parameters(), lr=.0005)
    for epoch in range(epochs):
        for start in range(0, val_tokens.numel() - args.seq_len, args.seq_len):
            x, y = val_tokens[start:start + args.seq_len], val_tokens[start + 1:start + 1 + args.seq_len]
            optimizer.zero_grad()
            loss = model(x, y)
            loss.backward()
            optimizer.step()


def main(''')
    return changed(source, '    train(args, model)\n',
                   '    train(args, model)\n    adapt_before_quantization(args, model, val_tokens)\n')


def string_length():
    "A byte-fallback piece is counted by the length of its name."
    return changed(honest_source(), '''        if sp.is_byte(i):
            base[i] = 1
            continue
''', '')


def plain(source): return source


def packed(source):
    body = base64.b85encode(lzma.compress(source.encode())).decode()
    return f'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("{body}")))\n'


def twice_packed(source):
    body = base64.b64encode(zlib.compress(packed(source).encode())).decode()
    return ('import base64\nfrom zlib import decompress as d\n'
            f'payload = "{body}"\nexec(compile(d(base64.b64decode(payload)), "x", "exec"))\n')


WRAPPERS = [plain, packed, twice_packed]


def submission(folder, source, seed, bpb=1.0812):
    "Write a submission whose files support its claim."
    folder.mkdir()
    (folder/'train_gpt.py').write_text(WRAPPERS[seed % 3](source))
    for number in range(3):
        log = (f'seed:{number}\nstep:4550/20000 train_time:588012ms step_avg:129.2ms\n'
               f'Total submission size quantized+brotli: {15_990_000 + number} bytes\n'
               f'final val_bpb: {bpb + number*1e-4:.4f}\n')
        (folder/f'train_seed{number}.log').write_text(log)
    claim = {'name': 'A run', 'val_bpb': bpb + 1e-4, 'seeds': [0, 1, 2], 'bytes_total': 15_990_002}
    (folder/'submission.json').write_text(json.dumps(claim))


RUNS = {'two-pass rescoring': two_passes, 'best of k over epochs': best_of_epochs,
        'space counted twice': space_twice,
        'truncated validation': truncated, 'calibration after the clock': late_calibration,
        'over the cap on one seed only': too_large}
SOURCES = {'training on validation first': train_first,
           'byte fallback counted by string length': string_length}
