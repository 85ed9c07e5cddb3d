"The five slow witnesses against the vectors recorded from the five original systems, and against laws."
import json

import numpy as np
import pytest
import slow_341
import slow_927
import slow_1406
import slow_1493
import slow_1640

SLOW = {927: slow_927, 341: slow_341, 1640: slow_1640, 1406: slow_1406, 1493: slow_1493}
FORWARDS = [
    (927, 'forward'), (927, 'forward_b'), (927, 'forward_qat'), (927, 'forward_qat_b'),
    (341, 'forward'), (341, 'forward_b'), (1640, 'forward'), (1640, 'forward_qat'),
    (1406, 'forward'), (1406, 'forward_norecur'), (1406, 'forward_qat'),
    (1493, 'forward'), (1493, 'forward_norecur')]
FILES = [f'pr{pr}/{name}' for pr, name in FORWARDS]    # some of them are in tests/vectors
QAT = [case for case in FORWARDS if 'qat' in case[1]]


def vectors(reference, pr, name):
    "All arrays of one file, with the weights that it shares with another."
    with np.load(reference/f'pr{pr}'/f'{name}.npz', allow_pickle=False) as z: arrays = dict(z)
    if 'param_from' not in arrays: return arrays
    shared = vectors(reference, pr, str(arrays.pop('param_from')))
    return arrays | {name: a for name, a in shared.items() if name.startswith('param/')}


def part(z, prefix):
    "The arrays whose names start with `prefix`, without it."
    return {name.removeprefix(prefix): a for name, a in z.items() if name.startswith(prefix)}


def config_of(z):
    "What is stored with the vectors, whole."
    for key in ('config', 'config_json'):
        if key in z: return json.loads(str(z[key]))
    return {name: a.item() for name, a in part(z, 'cfg/').items()}


def run(pr, z, **changes):
    return SLOW[pr].forward(part(z, 'param/'), config_of(z) | changes, z['input_ids'])


def close(got, want, atol):
    "Equal up to `atol`; shapes too, which numpy would broadcast."
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def stream_close(got, want):
    "Equal up to two millionths of the largest value: where the stream is large, so are float32's errors."
    close(got, want, 2e-6*np.abs(want).max())


def bf16(x):
    "The nearest bfloat16 of each float32, ties to even, as float32."
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7fff + ((bits >> 16) & 1)) & np.uint32(0xffff0000)).view(np.float32)


# -- Against the recorded vectors ------------------------------------------------------------------------

def system_of(file):
    "The number and the name: of 'pr927/forward', 927 and 'forward'."
    folder, name = file.split('/')
    return int(folder.removeprefix('pr')), name


@pytest.mark.parametrize('name', FILES)
def test_logits_and_loss(reference, name):
    pr, name = system_of(name)
    z = vectors(reference, pr, name)
    got = run(pr, z)
    assert got['logits'].dtype == np.float64
    close(got['logits'], z['logits'], 1e-4)
    close(SLOW[pr].loss(got['logits'], z['target_ids']), z['loss'], 1e-5)
    if 'nll' in z: close(SLOW[pr].nll(got['logits'], z['target_ids']), z['nll'], 1e-4)
    if 'loss_last_n' in z:
        last_n = config_of(z)['last_n']
        close(SLOW[pr].loss(got['logits'], z['target_ids'], last_n), z['loss_last_n'], 1e-5)


@pytest.mark.parametrize('pr,name', FORWARDS)
def test_stream(reference, pr, name):
    "What goes into and comes out of every virtual layer, and x0."
    z = vectors(reference, pr, name)
    got = run(pr, z)
    if pr in (927, 341): wanted = {'inputs': z['trace/block_in'], 'outputs': z['trace/block_out']}
    elif pr == 1493: wanted = {'outputs': z['acts']}
    else:
        layers = range(len(part(z, 'act/block_in_')))
        wanted = {'inputs': [z[f'act/block_in_{v:02}'] for v in layers],
                  'block_outputs' if pr == 1640 else 'outputs': [z[f'act/block_out_{v:02}'] for v in layers]}
        stream_close(got['outputs'][-1], z['act/final_norm_in'])
    for key, layers in wanted.items():
        assert len(got[key]) == len(layers)
        for mine, theirs in zip(got[key], layers, strict=True): stream_close(mine, theirs)
    for key in ('trace/x0', 'act/x0'):
        if key in z: close(got['x0'], z[key], 2e-6)


@pytest.mark.parametrize('name', FILES)
def test_names_and_shapes(reference, name):
    pr, name = system_of(name)
    z = vectors(reference, pr, name)
    assert SLOW[pr].shapes(config_of(z)) == {name: a.shape for name, a in part(z, 'param/').items()}


@pytest.mark.parametrize('pr,name', [case for case in FORWARDS if case not in QAT])
def test_gradients(reference, pr, name):
    "Per unit step of every tensor along its gradient, the loss rises by the sum of the gradients' norms."
    z = vectors(reference, pr, name)
    grads, step = part(z, 'grad/'), 1e-5
    norms = {name: np.linalg.norm(g) for name, g in grads.items()}
    losses = []
    for sign in (1, -1):
        params = {name: w.astype(np.float64) + sign*step*grads[name]/(norms[name] or 1.0)
                  for name, w in part(z, 'param/').items()}
        got = SLOW[pr].forward(params, config_of(z), z['input_ids'])
        losses.append(SLOW[pr].loss(got['logits'], z['target_ids']))
    close((losses[0] - losses[1]) / (2*step) / sum(norms.values()), 1.0, 1e-5)


@pytest.mark.parametrize('name', [name for pr, name in FORWARDS if pr == 927])
def test_xsa_readings(reference, name):
    "The flags as the script writes them, and the README's reading of them."
    z = vectors(reference, 927, name)
    config = config_of(z)
    flags = slow_927.xsa_flags(config)
    assert flags == [bool(z['xsa_flags'][loop % config['num_blocks']]) for loop in range(config['num_loops'])]
    per_loop = slow_927.forward(part(z, 'param/'), config, z['input_ids'], xsa_per_loop=True)['logits']
    close(per_loop, z['logits_xsa_per_loop'], 1e-4)
    assert np.abs(per_loop - z['logits']).max() > 0.1


def test_buckets(reference):
    for name in ('forward', 'forward_b'):
        z = vectors(reference, 927, name)
        buckets = config_of(z)['bigram_buckets']
        close(slow_927.bigram_bucket(z['input_ids'], buckets), z['trace/bigram_bucket'], 0)
    z = vectors(reference, 1406, 'forward')
    vocab = config_of(z)['model']['bigram_vocab_size']
    close(slow_1406.bigram_bucket(z['input_ids'], vocab), z['bigram_hash'], 0)


@pytest.mark.parametrize('name', [name for pr, name in FORWARDS if pr == 1406])
def test_embeddings_1406(reference, name):
    z = vectors(reference, 1406, name)
    got = run(1406, z)
    for key, mine in {'bigram_out': 'bigram', 'smear_in': 'smear_in', 've_out': 've'}.items():
        close(got[mine], z[f'act/{key}'], 1e-5)
    evaluated = slow_1406.forward(part(z, 'param/'), config_of(z), z['input_ids'], training=False)['logits']
    close(evaluated, z['logits_eval'], 1e-4)
    close(slow_1406.loss(evaluated, z['target_ids']), z['loss_eval'], 1e-5)


@pytest.mark.parametrize('name', ['forward', 'forward_norecur'])
def test_visits_1493(reference, name):
    z = vectors(reference, 1493, name)
    encoder, decoder = slow_1493.visits(config_of(z), config_of(z)['looping_active'])
    assert (encoder, decoder) == (z['encoder_indices'].tolist(), z['decoder_indices'].tolist())
    assert encoder + decoder == z['act_block_index'].tolist()
    assert len(z['param/skip_weights']) == z['num_skip_weights']


@pytest.mark.parametrize('name', ['forward', 'forward_norecur'])
def test_float64_1493(reference, name):
    "The original in float64, whose rotary frequencies alone are float32."
    z = vectors(reference, 1493, name)
    c = config_of(z)
    exponents = np.arange(0, c['rope_dims'], 2, dtype=np.float32) / np.float32(c['rope_dims'])
    frequencies = np.float32(1) / np.float32(c['rope_base'])**exponents
    got = slow_1493.forward(part(z, 'param/'), c, z['input_ids'], frequencies=frequencies.astype(np.float64))
    close(got['logits'], z['logits_f64'], 1e-11)
    close(got['logits'], run(1493, z)['logits'], 1e-4)


def test_blocks_1493(reference):
    z = vectors(reference, 1493, 'blocks')
    c, slow = config_of(z), slow_1493
    params = part(vectors(reference, 1493, 'forward'), 'param/')
    p = {name: w.astype(np.float64) for name, w in params.items()}
    x, x0, i, j = (z[key].astype(np.float64) if z[key].ndim else int(z[key])
                   for key in ('x', 'x0', 'seq_block_index', 'par_block_index'))
    close(slow.block(p, c, i, x, x0), z['out_seq'], 1e-5)
    close(slow.block(p, c, j, x, x0), z['out_par'], 1e-5)
    close(slow.attention(p, c, i, x, xsa=True), z['attn_out_xsa'], 1e-5)
    close(slow.attention(p, c, i, x, xsa=False), z['attn_out_noxsa'], 1e-5)
    close(slow.mlp(p, i, x), z['mlp_out'], 1e-5)
    close(slow.rms(x), z['rmsnorm_out'], 1e-6)
    close(slow.rms(z['rmsnorm_small_in'].astype(np.float64)), z['rmsnorm_small_out'], 1e-6)
    y, v = z['xsa_y'].astype(np.float64), z['xsa_v'].astype(np.float64)
    group = y.shape[2] // v.shape[2]
    out = [slow.without_own_value(y[:, :, h], v[:, :, h//group]) for h in range(y.shape[2])]
    close(np.stack(out, 2), z['xsa_out'], 1e-6)


def test_fake_quant_927(reference):
    z = vectors(reference, 927, 'qat_unit')
    for bits in (4, 5, 6, 8): close(slow_927.fake_quant(z['w'], bits), z[f'bits{bits}/out'], 0)
    on = {'qat': True, 'qat_bits': 6, 'qat_mlp_bits': 0}
    for side in ('at', 'above'):    # at and above 65,536 elements
        w, x = (z[f'threshold/{side}/{key}'].astype(np.float64) for key in ('weight_bf16exact', 'x'))
        params = {'w.weight': w.astype(np.float32)}
        close(x @ slow_927.weight(params, 'w', on).T, z[f'threshold/{side}/y'], 1e-4)
        close(x @ slow_927.weight(params, 'w', {}).T, z[f'threshold/{side}/y_noquant'], 1e-4)


@pytest.mark.parametrize('pr,name', QAT)
def test_fake_quantisation_is_seen(reference, pr, name):
    "The vectors could not be met without it."
    z = vectors(reference, pr, name)
    assert np.abs(run(pr, z, qat=False)['logits'] - z['logits']).max() > 1e-2


def fake_quant_bf16(w):
    "Six bits a row, with every result rounded to bfloat16."
    scale = bf16(np.maximum(bf16(np.abs(w).max(1, keepdims=True) / np.float32(31)), np.float32(1e-8)))
    quantised = bf16(np.clip(np.round(bf16(w/scale)), -32, 31) * scale)
    return bf16(w + bf16(quantised - w))


def test_bf16_runs(reference):
    "The originals in bfloat16: no more than the right order of size, since each rounding moves the next."
    def near(got, logits, targets, loss):
        close(got, logits, 0.4)
        close(slow_927.loss(got, targets), loss, 1e-2)
    z = vectors(reference, 341, 'forward_amp')
    near(run(341, z)['logits'], z['logits'], z['target_ids'], z['loss'])
    z = vectors(reference, 927, 'forward_amp')
    near(run(927, z)['logits'], z['logits_off'], z['target_ids'], z['loss_off'])
    linear = lambda name: 'shared_blocks' in name or name == 'bigram.proj.weight'
    quantised = {name: fake_quant_bf16(w) if w.ndim == 2 and linear(name) else w
                 for name, w in part(z, 'param/').items()}
    got = slow_927.forward(quantised, config_of(z), z['input_ids'])['logits']
    near(got, z['logits_qat'], z['target_ids'], z['loss_qat'])
    for name in ('forward', 'forward_norecur'):
        z = vectors(reference, 1493, name)
        close(run(1493, z)['logits'], z['logits_bf16'], 0.4)


# -- Rotary tables ---------------------------------------------------------------------------------------

def table_close(got, want, positions, frequencies):
    "The recorded angles were float32: wrong by an ulp of the angle, so by more the later the position."
    allowed = 1e-6 + 2.0**-23 * np.asarray(positions)[:, None] * frequencies
    for a, b in zip(got, want, strict=True): assert a.shape == b.shape and (np.abs(a - b) <= allowed).all()


def table_bf16(positions, frequencies):
    "Positions, frequencies, angles and results, each rounded."
    angle = bf16(bf16(np.asarray(positions, np.float32))[:, None] * bf16(frequencies)).astype(np.float64)
    return bf16(np.cos(angle)), bf16(np.sin(angle))


@pytest.mark.parametrize('pr,head', [(927, 'hd16'), (927, 'hd32'), (341, 'hd16'), (341, 'hd64')])
def test_rotary_927_341(reference, pr, head):
    z = part(vectors(reference, pr, 'rotary'), f'{head}/')
    positions, frequencies = z['positions'], z['inv_freq_fp32'].astype(np.float64)
    got = SLOW[pr].rope_table(positions, 2*len(frequencies), z['base'])
    table_close(got, (z['cos_fp32'], z['sin_fp32']), positions, frequencies)
    if pr == 927:    # only the frequencies were rounded
        rounded = bf16(frequencies).astype(np.float64)
        close(rounded, z['inv_freq_asrun'], 0)
        angle = positions[:, None]*rounded
        table_close((np.cos(angle), np.sin(angle)), (z['cos_asrun'], z['sin_asrun']), positions, rounded)
    else:
        for a, key in zip(table_bf16(positions, frequencies), ('cos', 'sin'), strict=True):
            close(a, z[f'{key}_asrun_bf16'], 0)


def test_rope_1640(reference):
    z = vectors(reference, 1640, 'rope')
    for i, case in enumerate(config_of(z)['cases']):
        positions, d, base = z[f'pos/{i}'], case['head_dim'], case['base']
        frequencies = base**(-2*np.arange(d//2)/d)
        cos, sin = slow_1640.rope_table(positions, d, base)
        table_close((cos, sin), (z[f'fp32/cos/{i}'], z[f'fp32/sin/{i}']), positions, frequencies)
        x = z[f'x/{i}'].astype(np.float64)
        close(slow_1640.rotate(x, cos, sin), z[f'y/{i}'], 1e-3)
        close(slow_1640.rotate(x, z[f'fp32/cos/{i}'], z[f'fp32/sin/{i}']), z[f'y/{i}'], 1e-6)
        for a, key in zip(table_bf16(positions, frequencies), ('cos', 'sin'), strict=True):
            close(a, z[f'bf16/{key}/{i}'], 0)


def test_rope_1406(reference):
    "Also partial rotation, and the base rescaled for windows beyond the trained length."
    z = vectors(reference, 1406, 'rope')
    for i, case in enumerate(config_of(z)['cases']):
        positions, r = z[f'pos/{i}'], case['rope_dims'] or case['head_dim']
        cos, sin = slow_1406.rope_table(positions, r, case['base'], case['seq_len'], case['train_seq_len'])
        frequencies = case['base']**(-2*np.arange(r//2)/r)
        table_close((cos, sin), (z[f'cos/{i}'], z[f'sin/{i}']), positions, frequencies)
        x = z[f'x/{i}'].astype(np.float64)
        close(slow_1406.rotate(x, cos, sin), z[f'y/{i}'], 1e-3)
        close(slow_1406.rotate(x, z[f'cos/{i}'], z[f'sin/{i}']), z[f'y/{i}'], 1e-6)


def test_rope_1493(reference):
    z = vectors(reference, 1493, 'rope')
    c = config_of(z)
    positions, r, base, trained = np.arange(len(z['cos'])), c['rope_dims'], c['base'], c['train_seq_len']
    frequencies = slow_1493.rope_frequencies(r, base, trained, trained)
    close(frequencies, z['inv_freq'], 1e-7)
    table_close(slow_1493.rope_table(positions, frequencies), (z['cos'], z['sin']), positions, frequencies)
    x = z['apply_in'].astype(np.float64)    # [B,T,heads,d]
    cos, sin = slow_1493.rope_table(np.arange(x.shape[1]), frequencies)
    close(slow_1493.rotate(x.swapaxes(1, 2), cos, sin).swapaxes(1, 2), z['apply_out'], 1e-5)
    some = np.arange(96)
    stretched = slow_1493.rope_frequencies(r, base, len(some), int(z['ntk_train_seq_len']))
    want = z['ntk_cos_len96'], z['ntk_sin_len96']
    table_close(slow_1493.rope_table(some, stretched), want, some, stretched)
    rounded = bf16(frequencies)
    close(rounded, z['inv_freq_bf16'], 0)
    exact = np.float32(positions)[:, None] * rounded
    cos, sin = table_bf16(positions, frequencies)
    close(cos, z['cos_bf16_eager'], 0)
    close(sin, z['sin_bf16_eager'], 0)
    close(bf16(np.cos(exact)), z['cos_bf16_exactpos'], 2.0**-8)    # one rounding may fall the other way
    close(bf16(np.sin(exact)), z['sin_bf16_exactpos'], 2.0**-8)


# -- Laws, at sizes that no vector has: these run everywhere ---------------------------------------------

SHARED = {'vocab_size': 19, 'model_dim': 24, 'num_heads': 4, 'num_kv_heads': 2, 'mlp_mult': 2,
          'tie_embeddings': False, 'logit_softcap': 30.0, 'rope_base': 100.0}
SMALL = {
    927: SHARED | {
        'num_blocks': 3, 'num_loops': 5, 'xsa_last_n': 2, 'use_smear_gate': True, 'bigram_buckets': 11,
        'bigram_dim': 5, 've_enabled': True, 've_dim': 7, 've_last_n': 2,
        'qat': True, 'qat_bits': 6, 'qat_mlp_bits': 5, 'qat_min_numel': 200},
    341: SHARED | {'num_entry_layers': 2, 'num_exit_layers': 1, 'num_shared_blocks': 2, 'num_loops': 2},
    1640: {'qat': True, 'model': SHARED | {
        'num_unique_blocks': 3, 'recurrence_steps': 3, 'bigram_buckets': 11}},
    1406: {'qat': True, 'model': SHARED | {
        'num_layers': 5, 'mlp_mult': 1.5, 'bigram_vocab_size': 11, 'bigram_dim': 5, 've_enabled': True,
        've_dim': 7, 've_layers': '4,1', 'xsa_last_n': 2, 'rope_dims': 4, 'ln_scale': True,
        'recur_layers': [1, 2]}},
    1493: SHARED | {
        'num_layers': 6, 'mlp_mult': 1.5, 'embedding_dim': 24, 'xsa_last_n': 4, 'skip_gates_enabled': True,
        'rope_dims': 4, 'train_seq_len': 8, 'ln_scale': True, 'num_loops': 2, 'loop_start': 1, 'loop_end': 2,
        'parallel_residual_start': 4, 'looping_active': True}}


def small(pr, T=12):
    rng = np.random.default_rng(pr)
    config = SMALL[pr]
    return config, SLOW[pr].random_params(config, pr), rng.integers(0, 19, (2, T))


@pytest.mark.parametrize('pr', SLOW)
def test_every_parameter_matters(pr):
    "With any one tensor taken from another seed, the logits are other ones."
    config, params, tokens = small(pr)
    logits = SLOW[pr].forward(params, config, tokens)['logits']
    assert 0.5 < logits.std() < 20    # neither flat nor all at the cap
    for name, w in params.items():
        assert w.dtype == np.float32
        other = SLOW[pr].random_params(config, pr + 1)[name]
        changed = SLOW[pr].forward(params | {name: other}, config, tokens)['logits']
        assert np.abs(changed - logits).max() > 1e-3, name


@pytest.mark.parametrize('pr', SLOW)
def test_no_look_ahead(pr):
    "Another token at position 7 changes what is said there and later, and nothing before."
    config, params, tokens = small(pr)
    other = tokens.copy()
    other[:, 7] = (other[:, 7] + 1) % 19
    a, b = (SLOW[pr].forward(params, config, t)['logits'] for t in (tokens, other))
    change = np.abs(a - b).max((0, 2))
    assert (change[:7] == 0).all() and (change[7:] > 0).all()


@pytest.mark.parametrize('pr', SLOW)
def test_one_token(pr):
    "A window of one: no position before it, no pair to hash."
    config, params, tokens = small(pr, T=12)
    if pr == 1493: config = config | {'train_seq_len': 12}    # else the longer window would stretch the base
    close(SLOW[pr].forward(params, config, tokens[:, :1])['logits'],
          SLOW[pr].forward(params, config, tokens)['logits'][:, :1], 1e-12)


@pytest.mark.parametrize('pr', SLOW)
def test_loss_by_hand(pr):
    "Even logits cost ln V wherever they count; the last positions are counted alone when asked."
    logits, targets = np.zeros((2, 3, 4)), np.array([[0, 1, 2], [3, 0, 1]])
    logits[:, 0, :] = [50.0, 0, 0, 0]
    assert SLOW[pr].loss(logits, targets, last_n=2) == pytest.approx(np.log(4), abs=1e-12)
    assert SLOW[pr].loss(logits, targets) == pytest.approx((4*np.log(4) + 50) / 6, abs=1e-12)


def test_long_windows_1406():
    "Beyond 1024 positions the base grows, so that what was said before changes; 1024 is not beyond."
    config = {'model': SMALL[1406]['model'] | {'num_layers': 1, 'recur_layers': [], 've_layers': '0'}}
    params = slow_1406.random_params(config, 0)
    tokens = np.random.default_rng(0).integers(0, 19, (1, 1026))
    logits = lambda T: slow_1406.forward(params, config, tokens[:, :T])['logits'][:, :1000]
    a, b, c = logits(1000), logits(1024), logits(1026)
    assert np.abs(a - b).max() < 1e-11 < 1e-6 < np.abs(a - c).max()
