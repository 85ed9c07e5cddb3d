"Quality at equal time: tune settings on held-out training documents, then score seeds on validation."
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from beside import write_record

ROOT = Path(__file__).parents[1]
SIZE = '--model.vocab {} --model.dim {} --model.hidden {}'.format
TRIED = {                                                         # changes to `tiny`
    'vocab 2048, dim 192': SIZE(2048, 192, 576),
    'vocab 4096, dim 192': SIZE(4096, 192, 576),
    'vocab 8192, dim 192': SIZE(8192, 192, 576),
    'vocab 12288, dim 192': SIZE(12288, 192, 576),
    'vocab 2048, dim 256': SIZE(2048, 256, 768),
    'vocab 4096, dim 256': SIZE(4096, 256, 768),
    'vocab 4096, dim 160': SIZE(4096, 160, 480) + ' --model.heads 5 --model.kv-heads 1',
    'vocab 4096, dim 192, hidden 320': SIZE(4096, 192, 320) + ' --model.bigram.buckets 1024',
    'vocab 6144, dim 128': SIZE(6144, 128, 512),
}


def run(options, folder, threads, one):
    "Train, quantize, and score one model in its own process; return the relevant part of its report."
    name, changed, seed = one
    place = folder/f'{name.replace(" ", "-").replace(",", "")}-{seed}'
    words = [*changed.split(), '--seed', seed, '--out', place, *options]
    command = [sys.executable, '-m', 'golf_nb.train', *map(str, words)]
    environ = os.environ | {'OMP_NUM_THREADS': str(threads), 'MKL_NUM_THREADS': str(threads)}
    with (folder/f'{place.name}.txt').open('wb') as said:
        subprocess.run(command, stdout=said, stderr=said, check=True, env=environ)
    report = json.loads((place/'report.json').read_text())
    kept = {key: report[key] for key in ('bpb', 'parameters', 'cost', 'commit')}
    quantized, size = report['bpb']['post_quant'], report['artifact']['total']
    print(f'{name}, seed {seed}: {quantized:.4f} bpb, {size:,} bytes', flush=True)
    return {'name': name, 'options': changed, 'seed': seed, 'bytes': size} | kept


def main():
    "Run the requested settings, and write one record."
    parser = argparse.ArgumentParser(description=__doc__, epilog='Other options go to golf_nb.train.')
    parser.add_argument('--tune', nargs='+', metavar='NAME', choices=TRIED,
                        help='settings to compare, two at a time, one thread each')
    parser.add_argument('--judge', metavar='PRESET', help='preset to score with two threads, seed by seed')
    parser.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
    parser.add_argument('--seconds', type=float, default=240, help='of training with two threads')
    parser.add_argument('--runs', type=Path, default=ROOT/'runs'/'quality', help='where runs go')
    parser.add_argument('--out', type=Path, required=True, help='the record; an existing one is extended')
    chosen, options = parser.parse_known_args()
    chosen.runs.mkdir(parents=True, exist_ok=True)
    if chosen.judge:
        source, threads, workers, seconds = 'sotu', 2, 1, chosen.seconds
        todo = [(chosen.judge, f'--preset {chosen.judge}', seed) for seed in chosen.seeds]
    else:
        source, threads, workers, seconds = 'sotu-tune', 1, 2, 2*chosen.seconds
        todo = [(name, TRIED[name], 1) for name in chosen.tune]
    same, before = {'source': source, 'threads': threads, 'seconds': seconds}, []
    if chosen.out.exists():
        old = json.loads(chosen.out.read_text())
        before = old['records']
        if {key: old[key] for key in same} != same: parser.error(f'{chosen.out} is of other runs')
    options += ['--data.source', source, '--seconds', seconds]
    with ThreadPoolExecutor(workers) as pool:
        records = list(pool.map(partial(run, options, chosen.runs, threads), todo))
    write_record(chosen.out, records=[*before, *records], **same)


if __name__ == '__main__': main()
