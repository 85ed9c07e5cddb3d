"Error analysis on the five systems, shrunk, in float64, against finite differences and brute force."
import json
from copy import deepcopy
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reading import one_now
from safetensors.torch import save_file

from golf_nb.artifact import save
from golf_nb.block import Weights
from golf_nb.config import EvalConfig, ModelConfig, QuantConfig, RunConfig, to_dict
from golf_nb.model import build
from golf_nb.presets import PRESETS
from golf_nb.quant import convert, plan_grids, prepare, restore
from golf_nb.schedule import first_visits, from_order
from golf_nb.study.compounding import (
    KINDS,
    CompoundingError,
    Text,
    Untied,
    by_size,
    gap,
    growth,
    interactions,
    jacobian,
    law,
    mask_gaps,
    measure_growth,
    measure_masks,
    measure_prediction,
    measure_rounding,
    naive_predictors,
    outputs,
    passes,
    predict,
    predict_along,
    round_weights,
    score_text,
    shapley,
    shift,
    singular_values,
    text_of,
    transport,
    typical_gain,
    untie,
    weight_error,
)
from golf_nb.study.measures import load_pair, validation_text
from golf_nb.tokenizer import ByteTable

pytestmark = pytest.mark.filterwarnings('ignore:.torch.jit.script. is deprecated')  # inside torch.func
FIVE = {   # the five systems in fewer visits: skips of all kinds, FiLM, value embeddings, parallel layers
    'cycle': from_order((2*[0, 1, 2])[:5], per_visit={'cond'}, xsa=range(5), value_embed=[3, 4]),
    'hybrid': from_order([0] + 2*[1, 2] + [3], per_visit={'cond', 'gain'}),
    'universal': from_order(2*[0, 1, 2], film=True, site='after'),
    'replay': from_order([0, 1, 2, 3, 1, 2], unet=4, xsa=[2, 3], value_embed=[2, 3]),
    'loop3': from_order([0] + 2*[1, 2] + [3], gated=True, xsa=range(6), parallel=[4, 5]),
}
GRID = QuantConfig(bits=4, min_numel=100)
TEXT = Text(torch.randint(24, (2, 7), generator=torch.Generator().manual_seed(0)), 30)
INPUTS = TEXT.rows[:, :-1]
TABLE = ByteTable(np.full(24, 2, np.int16), np.zeros(24, bool), np.zeros(24, bool))


def moved(config):
    "A model without trivial zeros and ones."
    model = build(config, seed=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.15*torch.randn_like(p))
    return model.double().requires_grad_(False)


@pytest.fixture(scope='module', params=one_now(FIVE, 'cycle', 'loop3'))
def system(request):
    "A system at width 16, with the error of rounding its blocks to 4 bits."
    config = PRESETS[request.param].scales['mini'].model
    bigram = config.bigram and replace(config.bigram, buckets=16, dim=config.bigram.dim and 4)
    extra = config.value_embed and replace(config.value_embed, dim=4)
    rope = replace(config.rope, dims=4, reference_len=None)
    model = moved(replace(config, schedule=FIVE[request.param], vocab=24, dim=16, heads=2, kv_heads=1,
                          hidden=20, bigram=bigram, value_embed=extra, rope=rope))
    return model, weight_error(model, round_weights(model, GRID))


@pytest.fixture(scope='module')
def loop():
    "One block that runs three times between two that run once, and its error."
    schedule = from_order([0, 1, 1, 1, 2], per_visit={'cond'})
    model = moved(ModelConfig(schedule=schedule, vocab=24, dim=16, heads=2, kv_heads=1, hidden=20))
    return model, weight_error(model, round_weights(model, GRID))


def scaled(error, epsilon): return {name: epsilon*d for name, d in error.items()}


# --- the untied view ---------------------------------------------------------------------------------------

def test_all_errors_at_once_are_the_quantized_model(system):
    model, error = system
    stored = build(model.config).double().requires_grad_(False)
    stored.load_state_dict({name: w + error[name] for name, w in model.state_dict().items()})
    untied = untie(model, error)
    assert len(untied.rest) == sum(not name.startswith('blocks.') for name in model.state_dict())
    torch.testing.assert_close(untied.logits(INPUTS, untied.amounts()), stored(INPUTS))
    assert torch.equal(untied.logits(INPUTS, untied.amounts('float')), model(INPUTS))
    nats = stored(INPUTS).log_softmax(-1).gather(-1, TEXT.rows[:, 1:, None])
    assert np.isclose(score_text(untied, TEXT, untied.amounts()), -float(nats.sum())/np.log(2)/TEXT.bytes)


def test_a_block_that_runs_once_is_tied_to_nothing(loop):
    model, error = loop
    model = moved(replace(model.config, schedule=from_order([0, 1, 2])))
    error = weight_error(model, round_weights(model, GRID))
    tied, fresh = (untie(model, error, kind, 3) for kind in ('tied', 'fresh'))
    for a, b in zip(tied.visits, fresh.visits, strict=True): assert all(map(torch.equal, a, b))
    parts = predict(tied, TEXT).parts()
    assert abs(parts['cross_visit']) < 1e-15 and np.isclose(parts['tied'], parts['fresh'])
    assert passes(tied) == {'once': [0, 1, 2], 'rest': [3]}


def test_kinds_differ_in_signs_only(loop):
    model, error = loop
    for kind in KINDS:
        for layer, visit in zip(model.config.schedule, untie(model, error, kind, 5).visits, strict=True):
            for name, d in zip(Weights._fields, visit, strict=True):
                assert torch.equal(d.abs(), error[f'blocks.{layer.block}.{name}'].abs())
    stored = untie(model, error)
    assert stored.visits[1] is stored.visits[2] and stored.amounts('antithetic') == [1, 1, -1, 1, 1, 1]
    by_amounts = untie(model, error, 'tied', 5)
    by_kind = untie(model, error, 'antithetic', 5)
    assert np.isclose(gap(by_amounts, TEXT, by_amounts.amounts('antithetic')), gap(by_kind, TEXT))
    other = untie(model, error, 'tied', 6)
    assert not torch.equal(other.visits[1].q, by_amounts.visits[1].q)


def test_another_schedule_over_the_same_blocks(loop):
    model, error = loop
    shorter = first_visits(model.config.schedule, 2)
    untied = untie(model, error, schedule=shorter)
    assert untied.blocks == (0, 1, 1, 2, -1)
    torch.testing.assert_close(untied.logits(INPUTS, [0.]*5), model(INPUTS, schedule=shorter))
    assert predict(untied, TEXT).curvature.shape == (5, 5)


def test_what_cannot_be_is_refused_in_one_line(loop):
    model, error = loop
    untied = untie(model, error)
    for wrong, words in (
        (lambda: untie(model, error, 'some'), 'errors are one of'),
        (lambda: untied.amounts('some'), 'amounts are one of'),
        (lambda: untied.logits(INPUTS, [1.]), '1 amounts for 6 sites'),
        (lambda: Untied(model, untied.schedule, untied.visits[1:], {}), '4 visits have errors'),
        (lambda: weight_error(model, {}), 'differ in'),
        (lambda: jacobian(model, INPUTS, 2, 1), 'no stretch 2..1'),
        (lambda: mask_gaps(untied, TEXT, [[0]]*13), '8,192 masks'),
        (lambda: text_of(np.arange(5), 8, bytes=TABLE), 'too few'),
    ):
        with pytest.raises(CompoundingError, match=words) as problem: wrong()
        assert len(str(problem.value).splitlines()) == 1
    quantizing = build(model.config)
    prepare(quantizing, plan_grids(quantizing.named_parameters(), GRID))
    with pytest.raises(CompoundingError, match='fake_quant = None'): untie(quantizing, error)


# --- prediction --------------------------------------------------------------------------------------------

def test_the_prediction_is_exact_for_small_errors(system):
    "After the gradient the rest falls as the square of the error, after the Hessian as the cube."
    model, error = system
    exact = predict(untie(model, error), TEXT, exact=True)
    sizes, left = (0.03, 0.01, 0.003), []
    for epsilon in sizes:
        found, ones = gap(untie(model, scaled(error, epsilon)), TEXT), np.ones(len(exact.blocks))
        left.append((abs(found - epsilon*exact.gradient.sum()), abs(found - exact.at(epsilon*ones))))
    orders = [np.polyfit(np.log(sizes), np.log(rest), 1)[0] for rest in zip(*left, strict=True)]
    assert abs(orders[0] - 2) < 0.3 and orders[1] > 2.5, orders


def test_shifts_and_curvature_by_finite_differences(system):
    model, error = system
    untied, step = untie(model, error), 1e-6
    sites = [0, len(untied.blocks)//2, len(untied.blocks) - 1]
    moves = []
    for direction in np.eye(untied.sites)[sites]:
        logits, change = shift(untied, INPUTS, direction)
        up, down = (untied.logits(INPUTS, sign*step*direction) for sign in (1, -1))
        torch.testing.assert_close(change, (up - down)/(2*step), atol=1e-6, rtol=1e-5)
        moves.append(change.flatten(0, 1))
    p = logits.softmax(-1).flatten(0, 1)
    fisher = torch.diag_embed(p) - p[:, :, None]*p[:, None, :]
    slow = [[float(torch.einsum('ni,nij,nj', a, fisher, b)) for b in moves] for a in moves]
    found = predict(untied, TEXT)
    curvature = found.curvature[np.ix_(sites, sites)]*np.log(2)*TEXT.bytes
    np.testing.assert_allclose(curvature, slow, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(predict_along(untied, TEXT), (found.gradient.sum(), found.curvature.sum()/2))
    whole = predict(untied, TEXT, exact=True)
    along = predict_along(untied, TEXT, exact=True)
    np.testing.assert_allclose(along, (whole.gradient.sum(), whole.curvature.sum()/2))
    np.testing.assert_allclose(whole.gradient, found.gradient, rtol=1e-8)
    np.testing.assert_allclose(whole.curvature, whole.curvature.T, rtol=1e-6, atol=1e-10)


def test_parts_add_up(system):
    model, error = system
    untied = untie(model, error)
    found = predict(untied, TEXT)
    parts, H, blocks = found.parts(), found.curvature, untied.blocks
    visits = sum(H[r, s] for r in range(len(H)) for s in range(len(H)) if r != s and blocks[r] == blocks[s])/2
    others = sum(H[r, s] for r in range(len(H)) for s in range(len(H)) if blocks[r] != blocks[s])/2
    np.testing.assert_allclose((parts['cross_visit'], parts['cross_block']), (visits, others), atol=1e-14)
    assert np.isclose(parts['alone'], np.trace(H)/2)
    assert np.isclose(parts['stored'], found.at(untied.amounts()))
    assert np.isclose(parts['first_order'] + parts['alone'] + visits + others, parts['stored'])


def test_random_signs_cost_on_average_what_is_predicted(loop):
    model, error = loop
    expected = predict(untie(model, error, rest=False), TEXT).parts()
    for kind in ('tied', 'fresh'):
        costs = [predict_along(untie(model, error, kind, seed, rest=False), TEXT) for seed in range(8)]
        first, second = np.mean(costs, 0)
        spread = np.std(costs, 0)/np.sqrt(len(costs))
        assert abs(first) < 4*spread[0]
        assert abs(second - expected[kind]) < 4*spread[1] + 0.35*expected[kind]    # one stored error: no mean


def test_gradients_of_visits(system):
    "The gradient by a site's amount is that of the visit's own matrices, along its error."
    model, error = system
    untied = untie(model, error, rest=False)
    weights = [Weights(*(w.detach().clone().requires_grad_() for w in model.blocks[block].weights()))
               for block in untied.blocks]
    logits = model(INPUTS, weights=weights)
    nats = -logits.log_softmax(-1).gather(-1, TEXT.rows[:, 1:, None]).sum()
    (nats/np.log(2)/TEXT.bytes).backward()
    along = [sum(float((w.grad*d).sum()) for w, d in zip(*pair, strict=True))
             for pair in zip(weights, untied.visits, strict=True)]
    np.testing.assert_allclose(along, predict(untied, TEXT).gradient, rtol=1e-8, atol=1e-14)


# --- growth and Jacobians ----------------------------------------------------------------------------------

def test_growth_is_the_transport_of_small_errors(system):
    model, error = system
    untied = untie(model, error)
    products = transport(untied, INPUTS, batch=2)
    small = untie(model, scaled(error, 1e-5))
    for kind in ('all', 'antithetic'):
        a = untied.amounts(kind)
        found = growth(small, INPUTS, a)
        np.testing.assert_allclose(found.error, 1e-5*np.sqrt(np.einsum('r,lrs,s', a, products, a)), rtol=1e-3)
    plain = outputs(untied, INPUTS, [0.]*untied.sites)
    np.testing.assert_allclose(found.state, plain.square().mean((1, 2, 3)).sqrt())
    sums = law(products, untied.blocks)
    np.testing.assert_allclose(sums['fresh'], sum(products[:, s, s] for s in range(untied.sites)))
    later = [r for r, block in enumerate(untied.blocks[:-1]) if r > 2]
    assert not products[2, later].any()                 # no error before its visit


def test_jacobians_carry_what_a_visit_puts_in(system):
    "What weights of visit r change at the end, by a JVP through them, is J of what they change at r."
    model, error = system
    untied, last = untie(model, error, rest=False), len(model.config.schedule) - 1
    for r in (0, last - 2):
        zero = torch.zeros((), dtype=torch.float64)
        def stream(t, r=r): return outputs(untied, INPUTS, [t if v == r else 0. for v in range(last + 1)])
        _, change = torch.func.jvp(stream, (zero,), (zero + 1,))
        linear = jacobian(model, INPUTS, r + 1, last)
        torch.testing.assert_close(linear.push(change[r][None])[0], change[last])
        u = torch.randn(change[last].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close((linear.pull(u[None])[0]*change[r]).sum(), (u*change[last]).sum())


def test_singular_values_of_a_matrix_that_is_written_down(loop):
    model, _ = loop
    linear = jacobian(model, INPUTS[:1, :2], 1, 3)
    size = linear.like.numel()
    J = linear.push(torch.eye(size, dtype=torch.float64).view(size, *linear.like.shape)).flatten(1)
    np.testing.assert_allclose(singular_values(linear, 4, 30), torch.linalg.svdvals(J)[:4], rtol=0.02)
    assert np.isclose(typical_gain(linear, 200), J.square().sum().div(size).sqrt(), rtol=0.1)


# --- masks -------------------------------------------------------------------------------------------------

def test_masks_add_up_to_the_whole_gap(system):
    model, error = system
    untied = untie(model, error)
    looped = [sites for name, sites in passes(untied).items() if name.startswith('visit')][:3]
    others = sorted(set(range(untied.sites)) - {site for sites in looped for site in sites})
    groups = looped + [others]
    gaps = mask_gaps(untied, TEXT, groups)
    terms = interactions(gaps)
    assert np.isclose(terms.sum(), gap(untied, TEXT)) and np.isclose(gaps[-1], gap(untied, TEXT))
    assert np.isclose(shapley(terms).sum(), gaps[-1]) and np.isclose(by_size(terms).sum(), gaps[-1])


@given(st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_interactions_by_inclusion_and_exclusion(n, seed):
    gaps = np.random.default_rng(seed).standard_normal(2**n)
    gaps[0] = 0
    terms = interactions(gaps)
    for mask in range(2**n):
        subsets = [sub for sub in range(mask + 1) if sub & mask == sub]
        signs = [(-1)**(mask ^ sub).bit_count() for sub in subsets]
        assert np.isclose(terms[mask], sum(s*gaps[sub] for s, sub in zip(signs, subsets, strict=True)))
        assert np.isclose(gaps[mask], terms[subsets].sum())
    assert np.isclose(shapley(terms).sum(), gaps[-1]) and np.isclose(by_size(terms).sum(), gaps[-1])


def test_shapley_values_are_means_over_orders():
    gaps = np.random.default_rng(1).standard_normal(8)
    gaps[0], added = 0, np.zeros(3)
    for order in permutations(range(3)):
        mask = 0
        for i in order: added[i], mask = added[i] + gaps[mask | 1 << i] - gaps[mask], mask | 1 << i
    np.testing.assert_allclose(shapley(interactions(gaps)), added/6)


def test_interactions_of_two_visits_are_second_derivatives(loop):
    model, error = loop
    exact = predict(untie(model, error), TEXT, exact=True)
    epsilon = 1e-3
    terms = interactions(mask_gaps(untie(model, scaled(error, epsilon)), TEXT, [[1], [2], [3]]))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pair = terms[1 << i | 1 << j]/epsilon**2
        assert np.isclose(pair, exact.curvature[i + 1, j + 1], rtol=0.05, atol=1e-4)


# --- naive predictors and measurements ---------------------------------------------------------------------

def test_naive_predictors_by_hand(loop):
    model, error = loop
    found, twice = (naive_predictors(model, e, TEXT) for e in (error, scaled(error, 2)))
    blocks = {name: d for name, d in error.items() if name.startswith('blocks.')}
    assert np.isclose(found['error_norm'], sum(float(d.square().sum()) for d in blocks.values())**0.5)
    powers = {'error_norm': 2, 'relative_error': 2, 'hessian_trace': 4, 'output_error': 4}
    for name, factor in powers.items(): assert np.isclose(twice[name], factor*found[name])
    assert np.isclose(twice['log10_spectral_product'] - found['log10_spectral_product'], np.log10(2))
    seen, readers = {}, {'attn_in': 'qkv', 'o_in': ('o',), 'mlp_in': ('up',), 'down_in': ('down',)}
    model(INPUTS, hook=lambda v, name, x: seen.update({(v, name): x}))
    total = 0.
    for v, layer in enumerate(model.config.schedule):
        for name, matrices in readers.items():
            for m in matrices:
                wrong = seen[v, name] @ error[f'blocks.{layer.block}.{m}'].T
                total += float(wrong.square().sum())
    assert np.isclose(found['output_error'], total/INPUTS.numel())


def test_measurements_are_ready_for_json(loop):
    model, error = loop
    weights = {name: w + error[name] for name, w in model.state_dict().items()}
    rows = measure_rounding(model, weights, TEXT, seeds=(0,))
    assert [(row['kind'], row['seed']) for row in rows[:4]] == [
        ('stored', None), ('tied', 0), ('fresh', 0), ('antithetic', 0)] and len(rows) == 4
    assert np.isclose(rows[0]['gap'], gap(untie(model, error, rest=False), TEXT))
    one = measure_prediction(model, weights, TEXT)
    assert np.isclose(one['gap'], gap(untie(model, error), TEXT)) and len(one['gradient']) == 6
    whole = predict_along(untie(model, error), TEXT, exact=True)
    assert np.isclose(one['predicted']['whole_hessian'], sum(whole))
    masks = measure_masks(model, weights, TEXT)
    assert list(masks['groups']) == ['once', 'visit 1', 'visit 2', 'visit 3', 'rest']
    assert np.isclose(sum(masks['terms']), one['gap'])
    assert np.isclose(sum(masks['predicted_terms']), one['predicted']['stored'])
    depth = measure_growth(model, weights, INPUTS, number=2, steps=2)
    assert depth['block'] == [0, 1, 1, 1, 2] and len(depth['singular_values']) == 5
    names = ('state', 'error', 'relative_error', 'error_gain', 'typical_gain')
    assert all(len(depth[name]) == 5 for name in names)
    blocks = untie(model, error, rest=False)
    for kind, sums in law(transport(blocks, INPUTS), blocks.blocks).items():
        assert np.allclose(depth['of_blocks'][kind], np.sqrt(sums), rtol=1e-3)
    assert all(depth['of_blocks']['fresh'][v] < depth['first_order']['fresh'][v] for v in range(5))
    assert json.loads(json.dumps([rows, one, masks, depth])) == [rows, one, masks, depth]


def test_a_run_directory(tmp_path, monkeypatch, loop):
    model = deepcopy(loop[0]).float()
    config = RunConfig(model=model.config, precision='fp32', quant=GRID, eval=EvalConfig(window=8))
    (tmp_path/'checkpoint').mkdir()
    (tmp_path/'config.json').write_text(json.dumps(to_dict(config)))
    save_file(model.state_dict(), tmp_path/'checkpoint'/'weights.safetensors')
    stored = convert(model.state_dict(), plan_grids(model.named_parameters(), GRID))
    save(tmp_path/'model.golf', stored)
    found, weights, again = load_pair(tmp_path)
    assert again == config and all(map(torch.equal, found.state_dict().values(), model.state_dict().values()))
    for name, w in restore(stored).items(): assert torch.equal(weights[name], w)
    finer = load_pair(tmp_path, bits=8)[1]
    errors = [sum(d.square().sum() for d in weight_error(found, w).values()) for w in (weights, finer)]
    assert errors[1] < errors[0]
    class Stub:
        byte_table = TABLE
        def val_tokens(self): return np.arange(100) % 24
    monkeypatch.setattr('golf_nb.study.measures.open_data', lambda config: Stub())
    text = validation_text(config, rows=3)
    assert text.rows.shape == (3, 9) and text.bytes == 48
    assert text.rows[:, 0].tolist() == [0, 8*4 % 24, 8*8 % 24]                     # evenly over twelve rows
    assert len(validation_text(config).rows) == 12
    assert np.isfinite(measure_prediction(found, weights, text)['gap'])
    as_run = replace(config, system=927, precision='as-run')
    (tmp_path/'config.json').write_text(json.dumps(to_dict(as_run)))
    with pytest.raises(CompoundingError, match='as-run'): load_pair(tmp_path)
