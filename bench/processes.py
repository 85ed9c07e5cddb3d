"Compare the losses of two processes with those of one, and with one where a weight is changed by an ulp."
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from golf_nb.files import write_atomically
from golf_nb.report import circumstances, read_log

FIT = Path(__file__).parents[1]/'tests'/'fit_only.py'


def losses(preset, precision, steps, tokens, processes=1, nudge=False):
    "Return the losses of a short run in new processes."
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *(torchrun if processes > 1 else []), FIT, preset, folder, '--steps', steps,
                 '--precision', precision, '--tokens', tokens, *(['--nudge'] if nudge else [])]
        subprocess.run([str(word) for word in words], check=True, capture_output=True,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
        return [line['nats'] for line in read_log(Path(folder)/'log.jsonl')]


def main():
    "Print the largest relative deviation of a loss, and write the record."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--presets', nargs='+', default=['cycle', 'hybrid', 'universal', 'replay', 'loop3'])
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--tokens', type=int, default=1024, help='tokens per step (default: %(default)s)')
    parser.add_argument('--precision', default='fp32', choices=['fp32', 'bf16', 'as-run'])
    parser.add_argument('--ulp', action='store_true', help='also compare with one weight changed by an ulp')
    parser.add_argument('--out', type=Path, help='write the record here')
    chosen = parser.parse_args()
    found = {}
    for preset in chosen.presets:
        same = preset, chosen.precision, chosen.steps, chosen.tokens
        one, others = losses(*same), {'two processes': losses(*same, processes=2)}
        if chosen.ulp: others['one weight moved by an ulp'] = losses(*same, nudge=True)
        apart = {name: max(abs(b/a - 1) for a, b in zip(one, other, strict=True))
                 for name, other in others.items()}
        found[preset] = apart | {'first': one[0], 'last': one[-1]}
        deviations = ', '.join(f'{name} {value:.1e}' for name, value in apart.items())
        print(f'{preset:10} {chosen.precision}, {chosen.steps} steps, {one[0]:.3f} -> {one[-1]:.3f} nats; '
              f'largest relative deviation of a loss: {deviations}', flush=True)
        if chosen.out:
            record = {'precision': chosen.precision, 'steps': chosen.steps, 'tokens': chosen.tokens,
                      'presets': found, **circumstances()}
            write_atomically(chosen.out, json.dumps(record, indent=1).encode())


if __name__ == '__main__': main()
