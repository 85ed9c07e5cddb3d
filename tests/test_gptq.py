"Quantizers against the originals' recordings, a slow reference, and properties of any matrix."
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reading import one_now
from torch import nn

from golf_nb.config import Calibration, QuantConfig, Rounding, from_dict, to_dict
from golf_nb.gptq import (
    COMPENSATED,
    READERS,
    add_damping,
    calibrate,
    collect_hessians,
    collect_linear_hessians,
    compensated_codes,
    feedback,
    generate_text,
    prune,
    quantize,
    quantize_linears,
    round_matrix,
    single_step_codes,
    stored_grid,
)
from golf_nb.kernels import choose
from golf_nb.model import build
from golf_nb.presets import PRESETS, get
from golf_nb.quant import (
    Codes,
    Grid,
    QuantError,
    convert,
    from_codes,
    plan_grids,
    restore,
    row_steps,
    to_codes,
)

# --- a slow reference ----------------------------------------------------------------------------------

def slow_gptq(w, steps, low, top, hessian, damping, act_order):
    "GPTQ column by column and row by row in float64, from its definition, with numpy alone."
    w, hessian, steps = (part.double().numpy().copy() for part in (w, hessian, steps))
    diagonal = hessian.diagonal().copy()
    dead = diagonal == 0
    hessian[dead, dead] = 1
    hessian += damping*hessian.diagonal().mean()*np.eye(len(hessian))
    order = np.argsort(-hessian.diagonal(), kind='stable') if act_order else np.arange(len(hessian))
    codes = np.zeros(w.shape, np.int64)
    for row in range(len(w)):
        rest, free = w[row].copy(), list(order)
        rest[dead] = 0
        while free:
            inverse = np.linalg.inv(hessian[np.ix_(free, free)])
            j = free.pop(0)
            codes[row, j] = np.clip(np.round(rest[j]/steps[row]), low, top)
            error = rest[j] - codes[row, j]*steps[row]
            rest[free] -= error*inverse[0, 1:]/inverse[0, 0]
    return codes


def inputs(generator, samples, size, rank=5):
    "Correlated inputs."
    mix = torch.randn(rank, size, generator=generator)
    noise = torch.randn(samples, size, generator=generator)
    return torch.randn(samples, rank, generator=generator) @ mix + noise


@pytest.mark.parametrize('act_order', [False, True])
@pytest.mark.parametrize('rows, size, block', [
    (3, 1, 128), (5, 17, 4), (4, 40, 128), (4, 40, 7), (2, 64, 16)])
def test_blocks_equal_the_definition(rows, size, block, act_order):
    generator = torch.Generator().manual_seed(size + block)
    w, x = torch.randn(rows, size, generator=generator), inputs(generator, 300, size)
    if size > 20: x[:, [3, size - 1]] = 0      # dead inputs
    hessian, grid = x.T @ x, Grid(4)
    steps = row_steps(w, grid)
    known = feedback(hessian, Calibration(damping=.01, act_order=act_order, block=block))
    fast = compensated_codes(w, steps, grid, known)
    slow = slow_gptq(w, steps, -grid.top, grid.top, hessian, .01, act_order)
    assert (fast.numpy() == slow).all()
    if size > 20: assert not fast[:, [3, size - 1]].any()


def weighted(w, codes, steps, hessian):
    "Output error, summed over rows."
    delta = (w - from_codes(codes, steps)).double()
    return ((delta @ hessian.double())*delta).sum().item()


@pytest.mark.parametrize('bits', [2, 3, 4, 6])
@pytest.mark.parametrize('size', [8, 40, 160])
def test_feedback_lowers_the_error_of_the_outputs(size, bits):
    "Not a theorem: GPTQ is greedy, so a single row can lose. Matrices of many rows do not."
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        w, x = torch.randn(64, size, generator=generator), inputs(generator, 4*size, size, rank=3)
        hessian, grid = x.T @ x, Grid(bits)
        steps = row_steps(w, grid)
        ours, plain = compensated_codes(w, steps, grid, feedback(hessian)), to_codes(w, steps, grid)
        assert weighted(w, ours, steps, hessian) <= weighted(w, plain, steps, hessian)


ROUNDINGS = [Rounding(), Rounding((.85, .9, 1.), clip=True), Rounding((.999, 1.), 'matrix', floor=1.),
             Rounding((.9999,), low=True, half='after', floor=1.), get('universal').quant.again]
values = st.sampled_from([0., 1., -1., 1e-30, 1e-9, -3e-5, .5, 7., -4000., 3e3])


@given(rows=st.integers(1, 6), size=st.integers(1, 9), bits=st.integers(2, 8), data=st.data(),
       rounding=st.sampled_from(ROUNDINGS), scale=st.sampled_from(['max', 'std']), fed=st.booleans())
def test_any_matrix_is_rounded_within_its_grid(rows, size, bits, data, rounding, scale, fed):
    cells = data.draw(st.lists(values, min_size=rows*size, max_size=rows*size))
    w, grid = torch.tensor(cells).view(rows, size), stored_grid(Grid(bits, scale), rounding)
    known = feedback(torch.eye(size) + .5) if fed else None
    codes, steps = round_matrix(w, grid, rounding, known)
    assert codes.shape == w.shape and codes.dtype == torch.int8 and steps.shape == (rows,)
    assert torch.isfinite(steps).all() and (steps > 0).all()
    assert codes.min() >= -grid.top - grid.low and codes.max() <= grid.top
    assert not codes[(w == 0).all(dim=1)].any()      # rows of zeros stay zeros
    again = round_matrix(w, grid, rounding, known)
    assert torch.equal(again[0], codes) and torch.equal(again[1], steps)


@pytest.mark.parametrize('size', [1e6, 1e30])
def test_a_step_beyond_fp16_is_an_error(size):
    linear = nn.Linear(4, 4)
    with torch.no_grad(): linear.weight.copy_(torch.eye(4)*size)
    with pytest.raises(QuantError, match='weight: steps .* do not fit fp16'):
        quantize_linears(linear, {}, Grid(2), Rounding())


@given(seed=st.integers(0, 999), rows=st.integers(1, 5), size=st.integers(2, 40), bits=st.integers(3, 8))
def test_the_best_percentile_is_chosen(seed, rows, size, bits):
    w = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    ends, grid = (.8, .9, 1.), Grid(bits)
    def errors(rounding):
        codes, steps = round_matrix(w, grid, rounding)
        return (w - from_codes(codes, steps)).square().sum(dim=1)
    alone = torch.stack([errors(Rounding((end,))) for end in ends])
    torch.testing.assert_close(errors(Rounding(ends)), alone.amin(dim=0))
    torch.testing.assert_close(errors(Rounding(ends, 'matrix')).sum(), alone.sum(dim=1).amin())


@pytest.mark.parametrize('hessian, message', [
    (torch.tensor([[1., 3.], [3., 1.]]), 'condition'),
    (torch.full((2, 2), math.inf), 'NaN or Inf'),
    (torch.zeros(2, 2), 'never reached'),
])
def test_a_bad_hessian_is_an_error_that_names_the_tensor(hessian, message):
    with pytest.raises(QuantError, match='blocks.3.down') as caught: feedback(hessian, name='blocks.3.down')
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_too_little_text_without_damping_is_refused():
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(QuantError, match=r'64 x 64, damping 0\).*condition'):
        feedback(x.T @ x, Calibration(damping=0.))
    assert feedback(x.T @ x).upper.isfinite().all()      # the usual damping will do


# --- a looped module that is not ours -------------------------------------------------------------------

class Looped(nn.Module):
    "Two layers that run six times, with a growing stream; a plain torch module."
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(48, 96), nn.Linear(96, 48)

    def forward(self, x):
        for _ in range(6): x = x + self.second(torch.tanh(self.first(x)))
        return x


@pytest.fixture
def looped():
    torch.manual_seed(5)
    return Looped()


def text_for(looped, batches=6, seed=0):
    "Batches of correlated inputs, and others for evaluation."
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(5, 48, generator=generator)
    x = torch.randn(batches + 2, 200, 5, generator=generator) @ mix
    return list(x[:batches]), x[batches:].flatten(0, 1)


def test_its_hessian_is_the_sum_over_all_visits(looped):
    batches, _ = text_for(looped)
    found, slow = collect_linear_hessians(looped, batches), {'first.weight': 0., 'second.weight': 0.}
    visits = [torch.zeros(48, 48) for _ in range(6)]
    with torch.no_grad():
        for x in batches:
            for visit in range(6):
                inner = torch.tanh(looped.first(x))
                visits[visit] += x.T @ x/len(batches)
                slow = {'first.weight': slow['first.weight'] + x.T @ x,
                        'second.weight': slow['second.weight'] + inner.T @ inner}
                x = x + looped.second(inner)
    near = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-3)      # sums of many in fp32
    for name, total in slow.items(): near(found[name], total/len(batches))
    for visit in range(6):
        one = collect_linear_hessians(looped, batches, (0.,)*visit + (1.,))
        near(one['first.weight'], visits[visit])
    mixed = collect_linear_hessians(looped, batches, (.5, 0., 2.))
    near(mixed['first.weight'], .5*visits[0] + 2*visits[2])
    assert not looped.first._forward_pre_hooks and looped.training


def test_gptq_over_all_visits_beats_one_visit_and_plain_rounding(looped):
    batches, unseen = text_for(looped)
    truth, apart, weights = looped(unseen).detach(), {}, looped.state_dict()
    for way, visits in {'plain': None, 'first': (1.,), 'all': ()}.items():
        hessians = {} if visits is None else collect_linear_hessians(looped, batches, visits)
        rounding = Rounding() if visits is None else COMPENSATED
        stored = quantize_linears(looped, hessians, Grid(3), rounding)
        assert set(stored) == {'first.weight', 'second.weight'}
        copy = Looped()
        copy.load_state_dict(weights | {name: part.weights() for name, part in stored.items()})
        apart[way] = (copy(unseen) - truth).square().mean().item()
    assert apart['all'] < apart['first'] and apart['all'] < apart['plain'], apart


def test_linears_that_share_a_weight_count_together():
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    pair, x = nn.Sequential(a, b), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    found = collect_linear_hessians(pair, [x])
    y = a(x).detach()
    assert set(found) == {'0.weight'}
    torch.testing.assert_close(found['0.weight'], x.T @ x + y.T @ y)
    assert set(quantize_linears(pair, found)) == {'0.weight'}


def test_a_linear_that_never_runs_is_named():
    module = nn.ModuleDict({'used': nn.Linear(4, 4), 'unused': nn.Linear(4, 4)})
    module.forward = lambda x: module['used'](x)
    found = collect_linear_hessians(module, [torch.randn(30, 4)])
    with pytest.raises(QuantError, match='unused.weight: there is no Hessian'):
        quantize_linears(module, found)


# --- our own models -------------------------------------------------------------------------------------

SYSTEMS = 'cycle', 'hybrid', 'universal', 'replay', 'replay-s28', 'replay-s03', 'loop3'


@pytest.fixture(scope='module', params=one_now(SYSTEMS, 'cycle', 'hybrid', 'universal', 'loop3'))
def mini(request):
    "A mini model with nonzero weights, its recipe, and a little text."
    config, generator = get(request.param, 'mini'), torch.Generator().manual_seed(0)
    small = replace(config.quant.calibration, batches=2, length=12)
    model = build(config.model, seed=0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05*torch.randn(p.shape, generator=generator))
    text = torch.randint(config.model.vocab, (2, 1, 40), generator=generator)
    return model, replace(config.quant, calibration=small), text


def test_every_preset_stores_its_mini_model(mini):
    model, recipe, text = mini
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    stored = quantize(model, recipe, text, seed=1, size=lambda parts: 0)
    assert list(stored) == list(state)
    for name, part in stored.items():
        w, back = state[name], restore({name: part})[name]
        assert torch.equal(dict(model.named_parameters())[name], w) and back.shape == w.shape
        if isinstance(part, Codes):
            assert part.steps.dtype == torch.float16 and part.bottom <= part.codes.min()
            assert part.codes.max() <= part.top
            # half a step at most, where neither a percentile cuts nor feedback moves the weight on purpose
            if not recipe.rounding.feedback and recipe.again is None:
                cut = (w.abs() > part.top*part.steps.float()[:, None])
                assert ((back - w).abs() <= .51*part.steps.float()[:, None] + cut).all(), name
        elif part.dtype == torch.float32: assert torch.equal(part, w)
        else: torch.testing.assert_close(back, w, rtol=1e-3, atol=1e-7)
    if recipe.rounding.percentiles and recipe.rounding.feedback: return             # slow enough once
    again = quantize(model, recipe, text, seed=1)
    for name, part in stored.items():
        if isinstance(part, Codes): assert torch.equal(part.codes, again[name].codes)


def test_a_recipe_survives_json(mini):
    _, recipe, _ = mini
    assert from_dict(QuantConfig, to_dict(recipe)) == recipe


def test_hessians_of_our_models_are_sums_over_visits():
    model = build(get('loop3', 'mini').model, seed=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(.05*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    text, schedule, seen = torch.randint(1024, (2, 1, 24)), model.config.schedule, {}
    def hook(v, name, x):
        readers = [f'blocks.{schedule[v].block}.{matrix}' for matrix in READERS.get(name, ())]
        for reader in ['embed'] if name == 'head_in' else readers:
            seen.setdefault(reader, []).append(x.detach().flatten(0, 1).double())
    for tokens in text: model(tokens, hook=hook)
    found = collect_hessians(model, text)
    assert set(found) == set(seen) and len(seen['blocks.2.q']) == 6 and len(seen['blocks.0.q']) == 2
    for name, parts in seen.items():
        slow = sum(x.T @ x for x in parts)/2
        torch.testing.assert_close(found[name].double(), slow, rtol=1e-4, atol=1e-5*slow.abs().max().item())
    first = collect_hessians(model, text, visit_weights=(1.,))
    assert torch.equal(first['blocks.0.q'], found['blocks.0.q'])      # it runs only once
    assert first['blocks.2.q'].trace() < found['blocks.2.q'].trace()
    flat = calibrate(model, Calibration(schedule='flat', batches=2, first_damping=.5), text)
    torch.testing.assert_close(flat['blocks.0.q'], add_damping(found['blocks.0.q'], .5))


@pytest.mark.long
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_compiled_model_is_measured_as_it_is():
    model, text = build(get('tiny').model, seed=0), torch.randint(2048, (1, 1, 20))
    plain, written = collect_hessians(model, text), generate_text(model, 2, 6, seed=0)
    model = model.with_kernels(choose(compiled=True))
    for name, hessian in collect_hessians(model, text).items(): assert torch.equal(hessian, plain[name])
    assert torch.equal(generate_text(model, 2, 6, seed=0), written) and model.training


def test_the_default_recipe_is_convert():
    config = get('tiny')
    model = build(config.model, seed=3)
    state = {name: p.detach() for name, p in model.named_parameters()}
    simple, ours = convert(state, plan_grids(state.items(), config.quant)), quantize(model, config.quant)
    for name, part in simple.items():
        other = ours[name]
        if not isinstance(part, Codes): assert torch.equal(part, other) and part.dtype == other.dtype
        else: assert torch.equal(part.codes, other.codes) and torch.equal(part.steps, other.steps)


def test_no_text_no_hessian_no_size_are_errors():
    model, recipe = build(get('loop3', 'mini').model, seed=0), get('loop3', 'mini').quant
    with pytest.raises(QuantError, match='at least one batch'): quantize(model, recipe)
    with pytest.raises(QuantError, match='embed: there is no Hessian'):
        quantize(model, recipe, hessians={'other': torch.eye(1)})
    wrong = collect_hessians(model, torch.zeros(1, 1, 8, dtype=torch.long))
    with pytest.raises(QuantError, match=r'a Hessian \(3, 3\)'):
        quantize(model, recipe, hessians=wrong | {'blocks.0.q': torch.eye(3)})
    with pytest.raises(QuantError, match='prune_bytes'): quantize(model, QuantConfig(prune_bytes=1))
    with torch.no_grad(): model.blocks[0].q[0, 0] = math.nan
    with pytest.raises(QuantError, match='blocks.0.q holds NaN'):
        quantize(model, QuantConfig(min_numel=100))


def test_generated_text_depends_only_on_the_seed():
    model = build(get('replay-s03', 'mini').model, seed=0)
    texts = [generate_text(model, 3, 10, seed, group=group) for seed, group in ((0, 8), (0, 8), (1, 8))]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert texts[0].shape == (3, 10) and 0 <= texts[0].min() and texts[0].max() < 1024


@given(data=st.data(), rows=st.integers(1, 4), size=st.integers(1, 6), target=st.integers(0, 24))
def test_pruning_zeroes_as_few_cheap_codes_as_possible(data, rows, size, target):
    cells = data.draw(st.lists(st.integers(-2, 2), min_size=rows*size, max_size=rows*size))
    steps = data.draw(st.lists(st.sampled_from([.1, .2, .3]), min_size=rows, max_size=rows))
    part = Codes(torch.tensor(cells, dtype=torch.int8).view(rows, size), torch.tensor(steps).half(), 6)
    def size_of(parts): return int((parts['w'].codes != 0).sum())
    out = prune({'w': part}, target, size_of)['w'].codes
    ones, before = part.codes.abs() == 1, int((part.codes != 0).sum())
    gone = (out == 0) & (part.codes != 0)
    assert (gone <= ones).all() and torch.equal(out[~gone], part.codes[~gone])
    assert gone.sum() == min(max(before - target, 0), int(ones.sum()))
    cost = part.steps.float()[:, None].expand(rows, size)
    if gone.any() and (ones & ~gone).any(): assert cost[gone].max() <= cost[ones & ~gone].min()


def test_a_tensor_that_is_not_a_matrix_has_one_step():
    for shape in ((), (1,), (7,), (2, 3, 4)):
        part = single_step_codes(torch.ones(shape)*.5, 8)
        assert part.codes.shape == shape and (part.codes == 127).all() and part.steps.ndim == 0
        torch.testing.assert_close(part.weights(), torch.ones(shape)*.5)


@pytest.mark.parametrize('name', [name for name, preset in PRESETS.items() if 'full' in preset.scales])
def test_full_presets_have_a_recipe(name):
    recipe = get(name, 'full').quant
    assert recipe.min_numel == 65536 and recipe.rounding != Rounding()
    assert stored_grid(Grid(recipe.bits), recipe.rounding).top == 2**(recipe.bits - 1) - 1
