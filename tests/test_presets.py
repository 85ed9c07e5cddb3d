"Each preset at mini scale against a slow float64 version of its system's specification, on random weights."
import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from golf_nb.config import ConfigError, Init
from golf_nb.data import get_dataset
from golf_nb.interop.weights import from_reference, reference_config, to_reference
from golf_nb.model import build
from golf_nb.presets import PRESETS, Card, differs, get, variant
from golf_nb.step import Process, mean_loss, start, train_step

COMMON = {
    'vocab_size': 1024, 'model_dim': 256, 'tie_embeddings': True, 'logit_softcap': 30.0, 'rope_base': 10000.0}
# The mini presets in the words of the originals' own configurations.
MINI = {
    'cycle': (927, {
        **COMMON, 'num_blocks': 4, 'num_loops': 7, 'num_heads': 8, 'num_kv_heads': 4, 'mlp_mult': 2,
        'use_smear_gate': True,
        'bigram_buckets': 2048, 'bigram_dim': 64, 've_enabled': True, 've_dim': 64, 've_last_n': 2,
        'xsa_last_n': 4,
        'qat': False, 'qat_bits': 6, 'qat_mlp_bits': 0, 'qat_min_numel': None}),
    'hybrid': (341, {
        **COMMON, 'num_entry_layers': 1, 'num_exit_layers': 1, 'num_shared_blocks': 2, 'num_loops': 5,
        'num_heads': 4,
        'num_kv_heads': 2, 'mlp_mult': 2}),
    'universal': (1640, {'qat': False, 'model': {
        **COMMON, 'num_unique_blocks': 3, 'recurrence_steps': 4, 'num_heads': 4, 'num_kv_heads': 2,
        'mlp_mult': 3,
        'bigram_buckets': 512, 'qk_gain_init': 1.5, 'tied_embed_init_std': 0.005}}),
    'replay': (1406, {'model': {
        **COMMON, 'num_layers': 6, 'recur_layers': [2, 3], 'recur_enabled': True, 'num_heads': 4,
        'num_kv_heads': 2,
        'mlp_mult': 3.0, 'bigram_vocab_size': 512, 'bigram_dim': 64, 'rope_dims': 16, 've_enabled': True,
        've_dim': 64,
        've_layers': '4,5', 'xsa_last_n': 2, 'ln_scale': True, 'qk_gain_init': 5.0,
        'tied_embed_init_std': 0.005,
        'dtg': False, 'mtp_num_heads': 0, 'mtp_loss_weight': 0.2}}),
    'loop3': (1493, {
        **COMMON, 'embedding_dim': 256, 'num_layers': 7, 'xsa_last_n': 7, 'num_heads': 4, 'num_kv_heads': 2,
        'mlp_mult': 4.0,
        'skip_gates_enabled': True, 'rope_dims': 16, 'train_seq_len': 512, 'ln_scale': True,
        'qk_gain_init': 5.25,
        'num_loops': 2, 'loop_start': 2, 'loop_end': 3, 'parallel_residual_start': 5,
        'looping_active': True}),
}


def at_random(name, dtype):
    "A mini preset with weights that are nowhere trivial; the slow version, its weights and configuration."
    pr, config = MINI[name]
    slow = importlib.import_module(f'slow_{pr}')
    params = slow.random_params(config, 7)
    model = build(get(name, 'mini').model)
    model.load_state_dict(from_reference(pr, params, config).state_dict())
    return model.to(dtype), slow, params, config


@pytest.mark.parametrize('name', MINI)
def test_a_preset_computes_what_its_specification_says(name):
    model, slow, params, config = at_random(name, torch.float32)
    tokens = np.random.default_rng(3).integers(0, 1024, (2, 40))
    expected = slow.forward(params, config, tokens)['logits']
    with torch.no_grad(): logits = model(torch.from_numpy(tokens)).double().numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize('name', MINI)
def test_a_preset_has_the_names_and_shapes_of_its_original(name):
    model, slow, params, _ = at_random(name, torch.float32)
    back = to_reference(model, MINI[name][0])
    assert back.keys() == params.keys()
    assert all(np.array_equal(back[key].numpy(), params[key]) for key in params)


@pytest.mark.parametrize('name', MINI)
def test_a_preset_is_the_model_that_interop_reads(name):
    "Two ways to say one system agree on everything but how the weights start."
    pr, config = MINI[name]
    def shape(c):
        rope = replace(c.rope, reference_len=None)
        return replace(c, init=Init(), value_embed=None, bigram=None, rope=rope)
    assert shape(get(name, 'mini').model) == shape(reference_config(pr, config))


def test_at_the_start_every_system_knows_nothing():
    "The first loss is that of guessing, as the logs of all five show."
    tokens = torch.randint(1024, (2, 2, 33), generator=torch.Generator().manual_seed(0))
    for name in MINI:
        with torch.no_grad(): loss = build(get(name, 'mini').model).loss(*tokens).item()
        assert abs(loss - np.log(1024)) < 0.2, name


def test_every_preset_has_a_card_and_full_and_mini_differ_only_in_size():
    for name, preset in PRESETS.items():
        assert all(vars(preset.card).values())
        if 'full' in preset.scales:
            full, mini = (preset.scales[scale].model for scale in ('full', 'mini'))
            for field in ('activation', 'ln_scale', 'smear', 'tied', 'softcap'):
                assert getattr(full, field) == getattr(mini, field), name
            assert full.init.mix == mini.init.mix and full.init.q_gain == mini.init.q_gain


NO_CARD = Card(source='', idea='', reported='', status='')


def test_a_variant_is_its_base_but_for_what_it_names():
    made = variant('loop3', NO_CARD, preset='loop3', ttt=dict(epochs=1), mini={'data.seq_len': 256}).scales
    for scale, run in made.items():
        base = get('loop3', scale)
        data = replace(base.data, seq_len=256) if scale == 'mini' else base.data
        assert run == replace(base, ttt=replace(base.ttt, epochs=1), data=data)


@pytest.mark.parametrize('new, said', [
    (dict(model=dict(dimm=64)), 'model.dimm: unknown key; did you mean model.dim'),
    (dict(mini=dict(quant=dict(bits='6'))), 'quant.bits: expected int')])
def test_a_variant_with_an_unknown_or_wrong_field_is_refused(new, said):
    with pytest.raises(ConfigError, match=said): variant('cycle', NO_CARD, **new)


def test_variants_and_mini_scales_say_what_they_change():
    for name, preset in PRESETS.items():
        for scale in preset.scales:
            base, lines = differs(name, scale)
            expected = preset.base is not None or len(preset.scales) > 1 and scale == 'mini'
            assert bool(base) == bool(lines) == expected
    assert differs('loop3-flat', 'full')[0] == 'loop3, full' and differs('loop3')[0] == 'loop3, full'


def test_presets_of_a_public_system_know_its_number():
    for name, (pr, _) in MINI.items():
        family = [preset for key, preset in PRESETS.items() if name in (key, preset.base)]
        assert family and all(run.system == pr for preset in family for run in preset.scales.values())
    assert get('tiny').system is None and get('sprint').system is None


@pytest.mark.parametrize('precision', ['bf16', 'as-run'])
@pytest.mark.parametrize('name', MINI)
def test_a_preset_trains(name, precision):
    "Three steps on the real corpus with the preset's own recipe, on the grid from the start."
    config = get(name, 'mini')
    config = replace(
        config, precision=precision, compile=False, steps=3,
        quant=replace(config.quant, qat='ste', qat_start=0., qat_rate=None),
        data=replace(config.data, seq_len=32, batch_tokens=128))
    run = start(config, get_dataset('sotu', config.model.vocab), Process())
    assert (run.model.embed.dtype == torch.bfloat16) == (precision == 'as-run')
    found = []
    for _ in range(3):
        train_step(run)
        found.append(mean_loss(run))
    assert abs(found[0] - np.log(1024)) < 0.3 and all(np.isfinite(found))
    assert len(set(found)) == 3 and run.model.fake_quant is not None
