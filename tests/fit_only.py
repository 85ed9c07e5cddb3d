"Train a preset as the command does, but end with the last checkpoint: no artifact, no scores. Used by tests."
import argparse
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch

from golf_nb import trainer
from golf_nb.presets import get
from golf_nb.runs import open_data
from golf_nb.step import process_group, start
from golf_nb.trainer import fit, prime, resume, trim_log

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('preset')
parser.add_argument('out', type=Path)
parser.add_argument('--steps', type=int, default=20)
parser.add_argument('--precision', default='fp32')
parser.add_argument('--tokens', type=int, default=1024, help='of a step')
parser.add_argument('--seq-len', type=int, default=128)
parser.add_argument('--nudge', action='store_true', help='move one weight by one ulp')
parser.add_argument('--qat', help='another kind of training on the grid')
parser.add_argument('--checkpoint-seconds', type=float, default=1e6)
parser.add_argument('--kill-at', type=int, help='step that is taken, but not saved: kill -9 comes before')
parser.add_argument('--width', type=int, help='of the stream; all else of the model in proportion')
chosen = parser.parse_args()

mini = get(chosen.preset)
if chosen.width:
    model, share = mini.model, chosen.width/mini.model.dim
    model = replace(model, dim=chosen.width, hidden=round(model.hidden*share),
                    rope=replace(model.rope, dims=model.rope.dims and 8))
    quant = replace(mini.quant, min_numel=round(mini.quant.min_numel*share**2))
    mini = replace(mini, model=model, quant=quant)
config = replace(
    mini, steps=chosen.steps, precision=chosen.precision, compile=False, deterministic=True, log_every=1,
    checkpoint_seconds=chosen.checkpoint_seconds,
    quant=replace(mini.quant, **({'qat': chosen.qat} if chosen.qat else {})),
    optim=replace(mini.optim, ns_dtype='fp32' if chosen.precision == 'fp32' else 'bf16'),
    data=replace(mini.data, seq_len=chosen.seq_len, batch_tokens=chosen.tokens))
if chosen.kill_at:
    save = trainer.checkpoint

    def killed(run, folder):
        "Save, or die before it."
        if run.step == chosen.kill_at: os.kill(os.getpid(), signal.SIGKILL)
        save(run, folder)
    trainer.checkpoint = killed
torch.use_deterministic_algorithms(True)
chosen.out.mkdir(parents=True, exist_ok=True)
with process_group() as process:
    run = start(config, open_data(config), process)
    if chosen.nudge:
        w = run.model.embed.data
        w[100, 0] = torch.nextafter(w[100, 0], torch.tensor(9., dtype=w.dtype))
    prime(run)
    resume(run, chosen.out)
    if process.first: trim_log(chosen.out, run.step)
    fit(run, chosen.out, 3.)
