"Steps, rates, averages, and whole runs against the recorded ones; and a changed array is noticed."
import json

import numpy as np
import pytest
import torch
from reading import one_now

from golf_nb.interop.vectors import Vectors, check_file, distance, kind_of
from golf_nb.interop.vectors_model import TileProducts, tile_product
from golf_nb.interop.vectors_optim import OPTIM_KINDS, RECORDED, recipe
from golf_nb.interop.vectors_training import (
    TRAINING_KINDS,
    RecordedRun,
    begin,
    run_settings,
    shards,
    train_again,
)
from golf_nb.interop.weights import from_reference
from golf_nb.optim import Muon, orthogonalize
from golf_nb.presets import get

def changed(array, part):
    "A copy with every entry (of a part) changed by much more than any tolerance; or by one character."
    if array.dtype.kind == 'U': return np.array(str(array) + ' ')
    array = array.copy()
    where = slice(*part) if part else ...
    if array.dtype.kind in 'iu': array[where] += 1
    else: array[where] += 10
    return array


CHANGED = ['pr927/muon_step', 'pr1640/muon_step', 'pr1406/muoneqr_step', 'pr1493/muon_step', 'pr341/schedule',
           'pr1493/ema', 'pr341/train_steps', 'pr1640/e2e_init', 'pr1640/e2e_final']


@pytest.mark.parametrize('name', one_now(CHANGED, 'pr927/muon_step', 'pr341/schedule', 'pr1493/ema'))
def test_a_changed_array_is_noticed(reference, name):
    z = Vectors(reference/f'{name}.npz')
    computed, before = list(kind_of(z, OPTIM_KINDS + TRAINING_KINDS).compare(z)), dict(z.arrays)
    for one in computed:
        if not before[one.array].size: continue                             # nothing in it to change
        wrong = changed(before[one.array], one.part)
        part = slice(*one.part) if one.part else ...
        assert distance(one.ours, before[one.array][part], one.measure) <= one.tolerance
        assert distance(one.ours, wrong[part], one.measure) > one.tolerance, one.label


@pytest.mark.parametrize('name, array', one_now([
    ('pr927/muon_step', 'grad1/odd'), ('pr1493/ema', 'param/skip_gates'),
    ('pr341/train_steps', 'grad0/tok_emb.weight'), ('pr927/schedule', 'wallclock/elapsed_ms')],
    ('pr927/muon_step', 'grad1/odd')))
def test_a_changed_input_fails_end_to_end(reference, tmp_path, name, array):
    arrays = Vectors(reference/f'{name}.npz').arrays
    copy = tmp_path/name.split('/')[0]/'copy.npz'
    copy.parent.mkdir()
    np.savez(copy, **arrays | {array: arrays[array]*1.01})
    assert check_file(copy, OPTIM_KINDS + TRAINING_KINDS).verdict == 'FAIL'


def one_less(g, steps, dtype, **options): return orthogonalize(g, steps - 1, dtype, **options)


@pytest.mark.parametrize('mistake', [
    ('golf_nb.optim.COEFFICIENTS', {'quintic': [(3.4445, -4.7750, 2.0415)]}),    # one digit
    ('golf_nb.optim.orthogonalize', one_less),
    ('golf_nb.optim.max', lambda *sizes: 1)])                                    # the shape's factor
@pytest.mark.parametrize('name', [f'pr{pr}/muon_step' for pr in (927, 341, 1640, 1406, 1493)])
def test_a_mistake_in_a_step_fails(vectors, monkeypatch, name, mistake):
    monkeypatch.setattr(*mistake, raising=False)
    report = check_file(vectors/f'{name}.npz', OPTIM_KINDS)
    assert report.verdict == 'FAIL' and not report.error
    assert any(apart > tolerance for _, apart, tolerance, source in report.rows if source == RECORDED)


def test_the_recorded_order_of_sums_is_only_for_bf16():
    "Without it, on machines that sum otherwise, steps are near but not equal; either way they are near."
    torch.manual_seed(0)
    a, b = torch.randn(4, 64, 96).bfloat16(), torch.randn(4, 96, 64).bfloat16()
    with TileProducts(): assert torch.equal(a @ b, tile_product(a, b))
    wide = a.float() @ b.float()
    with TileProducts(): assert torch.equal(a.float() @ b.float(), wide)                  # left alone
    assert ((a @ b).float() - tile_product(a, b).float()).abs().max() <= 2**-8*wide.abs().max()


@pytest.mark.parametrize('pr', [927, 341, 1640, 1406, 1493])
def test_recipes_are_the_presets(pr):
    "Without settings of a file, the recipe is the preset's; only the shares of clipping are one process's."
    names = {927: 'cycle', 341: 'hybrid', 1640: 'universal', 1406: 'replay', 1493: 'loop3'}
    own, preset = recipe(pr, {}), get(names[pr], 'full').optim
    assert {field for field in vars(own) if getattr(own, field) != getattr(preset, field)} <= {'clip_shares'}


def test_settings_of_a_run_build_its_model(reference):
    for pr in (1640, 1406):
        z = Vectors(reference/f'pr{pr}'/'e2e_init.npz')
        model, run = run_settings(pr, z.config()['env'])
        built = from_reference(pr, z.under('init/'), model)
        assert sum(p.numel() for p in built.parameters()) == parameters_in(z) and run['iterations'] == 6


@pytest.mark.long
def test_a_shorter_run_begins_alike(reference):
    "One step instead of six: up to it, the losses are the recorded ones; validations come before and after."
    z = Vectors(reference/'pr1640'/'e2e_init.npz')
    env = {**z.config()['env'], 'ITERATIONS': '1', 'QAT_START_FRACTION': '1'}
    z.arrays['config_json'] = np.array(json.dumps({'env': env}))
    with shards([z[name] for name in sorted(z.names('train_tokens/'))]) as paths:
        ours = RecordedRun(z, z.under('init/'), paths)
        at = train_again(ours)
    assert at == {'steps': 8 + 3, 'grids': 8 + 3 + 8} and len(ours.losses) == 8 + 3 + 8 + 3
    first = z.arrays['losses_in_call_order'][:at['grids']]
    assert np.abs(np.array(ours.losses[:at['grids']]) - first).max() < 1e-5


def test_steps_are_taken_on_the_bits_of_the_file(reference):
    "#927 may have other bits in its MLPs."
    z = Vectors(reference/'pr927'/'train_steps.npz')
    c, params = z.config(), z.under('param0/')
    for own, in_mlp, expected in ((6, 0, {6}), (5, 0, {5}), (5, 4, {5, 4})):
        c['model'] |= {'qat_bits': own, 'qat_mlp_bits': in_mlp}
        with shards([z['train_tokens']]) as paths:
            data = dict(seq_len=16, batch_tokens=256, micro_batches=8)
            plan = begin(927, params, c, recipe(927, {}), paths, data, {}).model.fake_quant.plan
        assert {grid.bits for grid in plan.values() if grid} == expected
        assert plan['blocks.0.up'].bits == (in_mlp or own)


def test_a_run_without_dttt():
    "Settings say whether it took place."
    on, off = (run_settings(1406, env)[1]['ttt_enabled'] for env in ({}, {'TTT_ENABLED': '0'}))
    assert on and not off


def parameters_in(z):
    "What the original's log says."
    line = next(line for line in z.config()['log'] if line.startswith('model_params:'))
    return int(line.removeprefix('model_params:').split()[0])


def test_a_bf16_buffer_is_not_multiplied_by_a_rounded_momentum():
    "A list-wise product rounds the factor to bf16; the original multiplies each buffer by the factor itself."
    w, g = torch.nn.Parameter(torch.zeros(32, 32)), torch.randn(32, 32).bfloat16()
    muon = Muon([w], lr=0.1, momentum=0.9200466666666667, buffer='bf16')
    for _ in range(2):
        w.grad = g.float()
        muon.step()
    assert torch.equal(muon.state[w]['momentum'], (g*0.9200466666666667) + g)
