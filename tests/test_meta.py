"The path that a GPU takes, at full scale, on the device that computes nothing: shapes, dtypes, no waiting."
from dataclasses import replace

import pytest
import torch
from reading import one_now

from golf_nb.model import build
from golf_nb.optim import Clock, Muon, optimizers, set_rates
from golf_nb.presets import get
from golf_nb.quant import prepare, qat_plan

SYSTEMS = ['cycle', 'hybrid', 'universal', 'replay', 'loop3']


@pytest.mark.parametrize('preset', SYSTEMS)
@pytest.mark.parametrize('on_grid', one_now([False, True], True))
def test_a_step_at_full_scale_has_the_right_shapes_and_never_waits(preset, on_grid):
    "Anything that reads a number back (`item`, a condition) raises on this device, as it would stall a GPU."
    config = get(preset, 'full')
    model = build(config.model, device='meta')
    if on_grid: prepare(model, qat_plan(model.named_parameters(), replace(config.quant, qat='ste')), 'ste')
    rows, T = 2, config.data.seq_len
    text = torch.zeros(rows, T, dtype=torch.long, device='meta')
    nats = model.token_nats(text, text, dtype=torch.bfloat16)
    assert nats.shape == (rows, T) and nats.dtype == torch.float32
    assert model(text, dtype=torch.bfloat16).shape == (rows, T, config.model.vocab)
    nats.mean().backward()
    for p in model.parameters(): assert p.grad.shape == p.shape and p.grad.dtype == p.dtype
    made = optimizers(model, config.optim)
    set_rates(made, Clock(10, steps=100), config.optim)
    for optimizer in made:
        if isinstance(optimizer, Muon): optimizer.step()
    for optimizer in made:
        for state in optimizer.state.values(): assert all(value.is_meta for value in state.values())


@pytest.mark.parametrize('preset', SYSTEMS)
def test_scoring_a_stride_reads_out_only_its_positions(preset):
    "The last visit and the head run on the last positions; keys and values on all."
    model, seen = build(get(preset).model, device='meta'), {}
    text = torch.zeros(3, 512, dtype=torch.long, device='meta')
    def hook(v, name, x): seen[v, name] = x.shape
    nats = model.token_nats(text, text, last_n=64, dtype=torch.bfloat16, hook=hook)
    last = len(model.config.schedule) - 1
    assert nats.shape == (3, 64)
    assert seen[last, 'attn_in'][1] == 512 and seen[last, 'down_in'][1] == seen[last, 'o_in'][1] == 64
    assert seen[last - 1, 'down_in'][1] == 512
