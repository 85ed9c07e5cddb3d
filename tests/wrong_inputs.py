"""Wrong inputs, as people typed them: each must end in one line, soon. `python tests/wrong_inputs.py` tries
all of them one after another and prints a table: exit status, seconds, and what was said."""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

SMALL = """--model.dim 32 --model.hidden 64 --model.heads 2 --model.kv-heads 1 --model.vocab 300 --no-compile
--quant.min-numel 500 --data.seq-len 32 --data.batch-tokens 256 --eval.window 32 --eval.stride 32 --steps 3"""

# In these lines W is a folder of wrong things (see `prepare`), and RUN a finished run.
COMMANDS = '''
train --preset tinny
train --preset loop3 --scale huge
train --optim.lr 0.1
train --model.heads 3 --steps 2
train --model.kv-heads 3 --steps 2
train --quant.bits 9 --steps 2
train --seconds -5
train --seconds abc
train --steps 0
train --steps -3
train --data.batch-tokens 128 --steps 2
train --data.batch-tokens 1000 --steps 2
train --data.source W/empty --steps 2
train --data.source W/nothere --steps 2
train --data.source W/bin --steps 2
train --data.source W/lat --steps 2
train --data.source W/few --steps 2
train --data.source W/few --model.vocab 300 --steps 2
train --data.source W/one --steps 2
train --resume W/nothing
train --resume RUN --seed 9
train --out /proc/x --steps 2
train --out RUN --steps 2
train --model.schedule 0,1,x
train --eval.stride 0 --steps 2
train --eval.stride 100000 --steps 2
train --quant.qat maybe
train --max-bytes 0 --steps 2
evaluate W
evaluate W/nothere
ttt RUN --update foo
audit W/empty
artifact W/text.md
artifact W/cut.golf
artifact W/bad.golf
evaluate W/run
train --resume W/run2
train --resume W/run3
study.grid W/nothere.json
study.grid W/g.json
study.grid W/g2.json
train
train --model.dim 0
train --model.dim 1000000
train --model.vocab 70000
train --model.vocab 100
train --model.softcap nan
train --optim.matrix-lr inf
train --optim.betas 0.9 1.5
train --optim.betas 0.9
train --optim.warmdown-frac 2
train --data.seq-len 0
train --data.micro-batches 3
train --reserve 500
train --depth-at 0.5 0.2
train --model.schedule "0 (1 2x3"
train --model.schedule ""
train --precision fp64
train --checkpoint-seconds -1
train --log-every 0
train --quant.embed-bits 1
train --ttt.update sgd --ttt.chunk 0
train --data.tokenizer W/text.md
train --data.source W/gap --steps 2
train --data.source W/twice --steps 2
train --data.source W/stray --steps 2
train --precision as-run
train --unknown
evaluate RUN --source W/few
evaluate RUN --strid 3
ttt RUN --lr nan
ttt RUN --chunk -5
ttt W/nothere
audit W/nothere
audit nosuchmodule:Predictor
report W/nothere
report RUN W/empty
data W/nothere
data W/empty
artifact W/nothere.golf
artifact RUN/model.golf --cap abc
study.findings --results W/nothere
interop check W/nothere
measures --help
'''


def write_shards(folder, *names, repeat=False):
    "Shards of random tokens, with names of your choice."
    import numpy as np

    from golf_nb.data import write_shard
    folder.mkdir()
    for number, name in enumerate(names):
        write_shard(folder/name, np.random.default_rng(0 if repeat else number).integers(4, 299, 4096))


def prepare(W, run):
    "Wrong things of every kind, as files."
    (W/'empty').mkdir()
    for name, content in (('bin', bytes(range(256))*4), ('lat', 'caf\u00e9 '.encode('latin-1')*50)):
        (W/name).mkdir()
        (W/name/'a.txt').write_bytes(content)
    (W/'few').mkdir()
    for i in range(4): (W/'few'/f'{i}.txt').write_text(f'A few sentences, number {i}. They are short.\n'*3)
    (W/'one').mkdir()
    (W/'one'/'notes').write_text('no extension')
    (W/'text.md').write_text('# A title\n\nSome words.\n')
    for name in ('run', 'run2', 'run3'): shutil.copytree(run, W/name)
    content = (run/'model.golf').read_bytes()
    (W/'cut.golf').write_bytes(content[:len(content)//2])
    bad = bytearray(content)
    bad[len(bad)//2] ^= 1
    for path in (W/'bad.golf', W/'run'/'model.golf'): path.write_bytes(bad)
    (W/'run2'/'config.json').write_text((run/'config.json').read_text()[:100])
    latest = W/'run3'/'checkpoint'/'latest.safetensors'
    latest.write_bytes(latest.read_bytes()[:5000])
    grid = {'question': 'What?', 'arms': {'a': {'model.dimm': 3}}, 'seeds': [1, 2, 3], 'expect': []}
    (W/'g.json').write_text(json.dumps(grid))
    (W/'g2.json').write_text('{"question": "What?"\n "arms": {}}')
    write_shards(W/'gap', 'x_train_000000.bin', 'x_train_000002.bin', 'x_val_000000.bin')
    write_shards(W/'twice', 'x_train_000000.bin', 'x_train_000001.bin', 'x_val_000000.bin', repeat=True)
    write_shards(W/'stray', 'x_train_000000.bin', 'x_val_000000.bin', 'leftover.bin')
    for name in ('gap', 'twice', 'stray'): shutil.copy(W/'tokenizer.model', W/name/'t.model')


def finished_run(folder, texts):
    "A finished run of a very small net."
    texts.mkdir()
    for i in range(40):
        sentences = (f'The river {i} runs past mill {i*k % 7} and field {k}. ' for k in range(40))
        (texts/f'{i}.txt').write_text(''.join(sentences))
    command = [sys.executable, '-m', 'golf_nb.train', *SMALL.split(), '--data.source', texts, '--out', folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def tokenizer_of(texts, path):
    "A tokenizer for the folders of shards."
    from golf_nb.tokenizer import Tokenizer, train_tokenizer
    Tokenizer(train_tokenizer([p.read_text() for p in sorted(texts.glob('*.txt'))], 300)).save(path)


def world(folder):
    "Everything the commands need: the folder of wrong things, and a finished run."
    run, W = finished_run(folder/'run', folder/'texts'), folder/'W'
    W.mkdir()
    tokenizer_of(folder/'texts', W/'tokenizer.model')
    prepare(W, run)
    return W, run


def words_of(line, W, run):
    "The command line of one of the lines above."
    import shlex
    where = {'W': str(W), 'RUN': str(run)}
    def put(word):
        head, slash, rest = word.partition('/')
        return where.get(head, head) + slash + rest
    module, *words = shlex.split(line)
    return [sys.executable, '-m', f'golf_nb.{module}', *map(put, words)]


def tried(line, W, run):
    "Exit status, seconds, and the lines of the complaint; what was done before may have been told."
    begin = time.monotonic()
    how = dict(capture_output=True, text=True, cwd=W, timeout=60, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    try: done = subprocess.run(words_of(line, W, run), **how)
    except subprocess.TimeoutExpired: return None, 60., ['it goes on']
    said = [text for text in done.stderr.splitlines()
            if text.strip() and not re.match(r'\d\d:\d\d:\d\d ', text)]      # a log begins with the time
    return done.returncode, time.monotonic() - begin, said


def lines(): return [line for line in COMMANDS.strip().splitlines() if line != 'train']


def main():
    "Try all of them, and print a table."
    with TemporaryDirectory() as folder:
        W, run = world(Path(folder))
        spent, wrong = [], 0
        for line in lines():
            code, seconds, said = tried(line, W, run)
            spent.append(seconds)
            sound = code not in (0, None) and len(said) == 1
            wrong += not sound
            print(f'{"" if sound else "WRONG "}{line} | {code} | {seconds:.1f} s | {len(said)} | '
                  f'{(said or [""])[-1].replace(folder, "..")[:230]}', flush=True)
    print(f'{len(spent)} wrong inputs, {wrong} answered wrongly; median {statistics.median(spent):.2f} s, '
          f'longest {max(spent):.1f} s')
    return bool(wrong)


if __name__ == '__main__': sys.exit(main())
