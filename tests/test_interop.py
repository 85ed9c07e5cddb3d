"The originals' weights, files and vectors, against the recorded ones and against damage."
import io
import json
import lzma
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from reading import one_now

from golf_nb.gptq import feedback, round_matrix
from golf_nb.interop.command import ALL_KINDS, main
from golf_nb.interop.files import CODEC, load_artifact, load_checkpoint, shuffle_bytes, unshuffle_bytes
from golf_nb.interop.vectors import Vectors, check, check_file, kind_of, model_of
from golf_nb.interop.vectors_model import MODEL_KINDS, _visits_as_run
from golf_nb.interop.vectors_optim import OPTIM_KINDS, RECORDED
from golf_nb.interop.vectors_quant import export
from golf_nb.interop.vectors_training import TRAINING_KINDS
from golf_nb.interop.weights import (
    PULL_REQUESTS,
    InteropError,
    from_reference,
    reference_config,
    reference_init,
    reference_items,
    to_reference,
    xsa_per_visit,
)
from golf_nb.presets import get
from golf_nb.quant import Grid, from_codes
from golf_nb.runs import as_run

ROOT = Path(__file__).parents[1]
FORWARD = [f'pr{pr}/forward' for pr in PULL_REQUESTS] + ['pr927/forward_qat_b', 'pr1493/forward_norecur']


def refused(call, *words):
    "The message of a call that must be refused, in one line."
    with pytest.raises(InteropError) as error: call()
    assert '\n' not in str(error.value) and all(word in str(error.value) for word in words), error.value
    return str(error.value)


def opened(reference, name): return Vectors(reference/f'{name}.npz')


# --- vectors ---------------------------------------------------------------------------------------------

COMMITTED = sorted(path.relative_to(ROOT/'tests'/'vectors').as_posix().removesuffix('.npz')
                   for path in (ROOT/'tests'/'vectors').rglob('*.npz'))


@pytest.mark.parametrize('name', COMMITTED)
def test_the_committed_vectors_pass(vectors, name):
    report = check_file(vectors/f'{name}.npz', ALL_KINDS)
    assert report.verdict == 'pass' and not report.not_compared, report
    exact = [apart for _, apart, _, source in report.rows if source == RECORDED]
    assert max(exact, default=0) < 1e-6 and bool(exact) == ('muon' in name)


def test_the_committed_vectors_cover_each_system(vectors):
    "Forward pass with gradients, fake quantization, a step of Muon, a quantizer, scores: whoever has them."
    assert sum(path.stat().st_size for path in vectors.rglob('*') if path.is_file()) <= 6_000_000
    for pr in PULL_REQUESTS:
        names = {name.split('/')[1] for name in COMMITTED if name.startswith(f'pr{pr}/')}
        wanted = ['muon', 'sliding', 'forward', 'gptq' if pr == 1493 else 'quantize']
        wanted += ['forward_qat']*(pr in (927, 1640, 1406)) + ['ttt']*(pr in (927, 1406, 1493))
        assert all(any(name.startswith(kind) for name in names) for kind in wanted), (pr, names)
        grads = [array for name in names for array in Vectors(vectors/f'pr{pr}'/f'{name}.npz').names('grad/')]
        assert all(any(part in array for array in grads) for part in ('mlp', 'kv_' if pr == 1406 else 'attn'))
    said = (vectors/'README.md').read_text()
    assert not [name for name in COMMITTED if f'`{name.split("/")[1]}`' not in said]


RENUMBERED = {'pr1640/muon_step': {2: 0}, 'pr1406/muon_step': {2: 0}, 'pr1493/muon_step': {1: 0, 2: 1}}


@pytest.mark.parametrize('name', COMMITTED)
def test_the_committed_vectors_are_parts_of_the_recorded_ones(vectors, reference, name):
    "Arrays are the recorded ones, under the numbers that the README says; only settings are shortened."
    if reference == vectors: pytest.skip('needs all recorded vectors')
    ours, theirs = (dict(np.load(folder/f'{name}.npz')) for folder in (vectors, reference))
    for old, new in RENUMBERED.get(name, {}).items():
        theirs |= {f'{array[:-1]}{new}': w for array, w in theirs.items() if array.endswith(f'/{old}')}
    kept = {array for array in ours if array not in ('param_from', 'config', 'config_json', 'n')}
    assert not [array for array in kept if not np.array_equal(ours[array], theirs[array])]
    for settings in {'config', 'config_json'} & set(ours):
        whole, short = (json.loads(str(z[settings])) for z in (theirs, ours))
        changed = {key for key in whole if whole[key] != short.get(key)}
        allowed = {'order', 'shapes', 'momentum_per_step', 'nowd_weight_decay'} if 'muon' in name else set()
        if name == 'pr1640/quantize': allowed = {'dtypes', 'obj_dtypes', 'qmeta'}
        assert changed <= allowed


def test_files_share_parameters(vectors, tmp_path):
    one, other = Vectors(vectors/'pr1640'/'forward.npz'), Vectors(vectors/'pr1640'/'forward_qat.npz')
    assert one.names('param/') == other.names('param/') and 'param_from' not in other and not other.inputs
    shutil.copy(other.path, tmp_path/'alone.npz')
    refused(lambda: Vectors(tmp_path/'alone.npz'), 'forward.npz')


def test_a_system_that_is_not_built_is_named(tmp_path, capsys):
    (tmp_path/'pr9999').mkdir()
    np.savez(tmp_path/'pr9999'/'forward.npz', **{'param/w': np.zeros(2), 'logits': np.zeros(3)})
    assert main(['check', str(tmp_path)]) == 1
    assert 'pr9999/forward.npz: not compared (unknown' in (said := capsys.readouterr().out)
    assert '#9999 is not one of' in said and said.splitlines()[-1] == (
        '1 files: 0 pass, 0 FAIL, 1 not compared: exit 1 for pr9999/forward.npz')


def test_no_vector_file_is_forgotten(reference):
    "Each one is of a system that is built, or is said not to be."
    of_systems = [path for pr in PULL_REQUESTS for path in (reference/f'pr{pr}').glob('*.npz')]
    others = sorted(set(reference.rglob('*.npz')) - set(of_systems))
    assert len(of_systems) >= 77 and all(check_file(path, ALL_KINDS).kind == 'unknown' for path in others)


@pytest.mark.long
@pytest.mark.parametrize('pr', PULL_REQUESTS)
def test_every_vector_file_passes(reference, pr):
    reports = check(reference/f'pr{pr}', ALL_KINDS)
    missed = {r.name: r.error or [row for row in r.rows if not row[1] <= row[2]] for r in reports}
    assert not {name: why for name, why in missed.items() if why} and {r.verdict for r in reports} == {'pass'}
    for r in reports:                              # nothing is silently skipped, or listed under two heads
        lists = [{row[0].split('[')[0] for row in r.rows}, set(r.inputs), set(r.remarks), set(r.not_compared)]
        assert sorted(name for names in lists for name in names) == sorted(Vectors(reference/r.name).arrays)
        kind = r.name.split('/')[1].removesuffix('.npz')
        losses = [(tolerance, source) for array, _, tolerance, source in r.rows if '_loss' in f'_{array}']
        if kind in ('muon_step', 'muoneqr_step', 'train_steps'):     # with sums as recorded: nearly exact
            exact = {tolerance for _, _, tolerance, source in r.rows if source == RECORDED}
            assert exact == {1e-6}, r.name
        if kind in ('train', 'e2e_init'):                            # what is chaos says how large it is
            assert all(tolerance <= 5e-3 for tolerance, _ in losses[:3]) and 'one ulp' in losses[0][1]
        if kind == 'e2e_init': assert [tolerance for tolerance, _ in losses[:3]] == [1e-5, 1e-5, 5e-3]


def test_every_page_is_asked():
    "The command knows the kinds of all pages, those of the first page first."
    assert ALL_KINDS[:len(MODEL_KINDS)] == MODEL_KINDS
    assert {kind.name for kind in OPTIM_KINDS + TRAINING_KINDS} <= {kind.name for kind in ALL_KINDS}


def test_the_command(reference, tmp_path, capsys):
    assert main(['check', str(reference), '--only', 'rope', 'pr927/rotary.npz']) == 0
    said = capsys.readouterr().out
    assert 'pr927/rotary.npz: pass' in said and "this project's bound" in said and '4 files: 4 pass' in said
    np.savez(tmp_path/'unheard.npz', strange=np.zeros(3))
    assert main(['check', str(tmp_path)]) == 1                                         # nobody computes it
    assert 'not compared: ' in capsys.readouterr().out
    (tmp_path/'unheard.npz').unlink()
    for argv in ([str(tmp_path)], [str(tmp_path/'no')], [str(reference), '--only', 'x']):
        with pytest.raises(SystemExit) as end: main(['check', *argv])
        assert end.value.code == 2 and capsys.readouterr().err.startswith('error: ')


def test_the_command_as_a_module(reference, tmp_path):
    (tmp_path/'pr341').mkdir()
    shutil.copy(reference/'pr341'/'rotary.npz', tmp_path/'pr341'/'any_name.npz')
    command = [sys.executable, '-m', 'golf_nb.interop', 'check', str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and 'any_name.npz: pass' in done.stdout, done.stderr


def moved(array, tolerance):
    "A copy of an array with one entry moved by ten times a tolerance."
    if array.dtype.kind == 'U': return np.array(str(array) + ' ')
    array = array.copy()
    flat = array.reshape(-1)
    at = flat.size//2
    if array.dtype.kind == 'b': flat[at] = not flat[at]
    elif array.dtype.kind in 'iu': flat[at] += 1 if flat[at] < np.iinfo(array.dtype).max else -1
    elif tolerance: flat[at] += array.dtype.type(10*tolerance)
    else: flat[at] = np.nextafter(flat[at], np.inf, dtype=array.dtype)
    return array.reshape(np.shape(array))


PERTURBED = ['pr927/forward_b', 'pr341/forward_amp', 'pr341/rotary', 'pr1640/forward_qat', 'pr1640/data',
             'pr1406/forward_norecur', 'pr1406/bank_map', 'pr1493/blocks', 'pr1493/sp_luts', 'pr927/bpb',
             'pr927/qat_unit', 'pr341/init']


@pytest.mark.parametrize('name', one_now(PERTURBED, 'pr927/forward_b', 'pr341/rotary', 'pr1493/sp_luts'))
def test_every_change_is_noticed(reference, monkeypatch, name):
    "Each compared array is moved alone; ours are computed once, the rest of the check runs each time."
    path = reference/f'{name}.npz'
    kind, rows = kind_of(Vectors(path), ALL_KINDS), check_file(path, ALL_KINDS).rows
    computed = list(kind.compare(Vectors(path)))
    kinds = [kind._replace(compare=lambda z: iter(computed))]
    fresh = Vectors(path).arrays
    for array, _, tolerance, _ in rows:
        if not fresh[array].size: continue                                          # nothing in it to change
        changed = fresh | {array: moved(fresh[array], tolerance)}
        monkeypatch.setattr('golf_nb.interop.vectors.Vectors',
                            lambda path, changed=changed: recorded(path, changed))
        report = check_file(path, kinds)
        assert report.verdict == 'FAIL', array
        assert [row[0] for row in report.rows if row[1] > row[2]] == [array]


def recorded(path, arrays):
    "Vectors that hold these arrays."
    z = Vectors(path)
    z.arrays = arrays
    return z


@pytest.mark.parametrize('name, array', [('pr341/forward', 'loss'), ('pr927/rotary', 'hd16/inv_freq_asrun')])
def test_a_changed_copy_fails_end_to_end(reference, tmp_path, name, array):
    arrays = opened(reference, name).arrays
    tolerance = {row[0]: row[2] for row in check_file(reference/f'{name}.npz', ALL_KINDS).rows}[array]
    copy = tmp_path/name.split('/')[0]/'copy.npz'
    copy.parent.mkdir()
    np.savez(copy, **arrays)
    assert main(['check', str(tmp_path)]) == 0
    np.savez(copy, **arrays | {array: moved(arrays[array], tolerance)})
    assert main(['check', str(tmp_path)]) == 1


@pytest.mark.parametrize('name', FORWARD)
def test_round_trip_and_items(reference, name):
    z = opened(reference, name)
    pr, params = z.pr(), z.under('param/')
    model = model_of(z)
    back = to_reference(model, pr)
    assert {n: w.shape for n, w in back.items()} == {n: w.shape for n, w in params.items()}
    assert all(np.array_equal(back[n].numpy(), w) for n, w in params.items())
    items = {n: (ref, shape) for n, ref, shape in reference_items(model, pr)}
    assert all(shape == params[n].shape and ref.grad is None for n, (ref, shape) in items.items())
    model.loss(z.ids('input_ids'), z.ids('target_ids')).backward()
    before = {n: ref.grad.clone() for n, (ref, _) in items.items() if ref.grad is not None}
    model.loss(z.ids('input_ids'), z.ids('target_ids')).backward()       # `grad` is as of the call
    for n, grad in before.items(): torch.testing.assert_close(items[n][0].grad, 2*grad)
    with torch.no_grad():
        for p in model.parameters(): p.add_(1)
    assert all(np.allclose(ref.detach().numpy(), params[n] + 1) for n, (ref, _) in items.items())


@pytest.mark.parametrize('name', ['pr1406/forward_qat', 'pr1640/forward_qat', 'pr927/forward_qat'])
def test_fake_quantization_is_on_when_the_config_says_so(reference, name):
    z = opened(reference, name)
    with torch.no_grad():
        on, off = (model_of(z, qat=qat)(z.ids('input_ids')) for qat in (True, False))
        evaluated = model_of(z).eval()(z.ids('input_ids'))
    assert not torch.equal(on, off)
    assert torch.equal(evaluated, off if z.pr() == 1406 else on)                     # #1406: in training only


def test_the_late_loop_is_another_schedule_over_the_same_weights(reference):
    on, off = (opened(reference, f'pr1493/{name}') for name in ('forward', 'forward_norecur'))
    looping, flat = model_of(on), model_of(off)
    tokens = on.ids('input_ids')
    with torch.no_grad():
        assert torch.equal(looping(tokens, schedule=flat.config.schedule), flat(tokens))
        rounded = as_run(looping, 1493)(tokens, schedule=flat.config.schedule)   # keeps all rows
        assert torch.equal(rounded, as_run(flat, 1493)(tokens))
    assert len(looping.skips.weight) == len(flat.skips.weight) == int(off['num_skip_weights'])


def test_the_xsa_trap(reference):
    z = opened(reference, 'pr927/forward')
    model = model_of(z)
    assert all(layer.xsa for layer in model.config.schedule)
    assert [layer.xsa for layer in xsa_per_visit(model, z.config())] == 3*[False] + 4*[True]


def test_first_weights_repeat(reference):
    z = opened(reference, 'pr1640/init')
    state = torch.random.get_rng_state()
    first, second = (reference_init(1640, z.config(), seed) for seed in (1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first['tok_emb.weight'], second['tok_emb.weight'])


def test_as_run_keeps_the_parameters_apart(reference):
    z = opened(reference, 'pr927/forward')
    same = model_of(z)
    model = as_run(same, 927)
    assert {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16} == \
           {'embed', 'bigram.table', 'value_embed.table'}
    with torch.no_grad(): rough, exact = model(z.ids('input_ids')), same(z.ids('input_ids'))
    assert rough.dtype == torch.bfloat16 and 0 < (rough.float() - exact).abs().max() < .5


@pytest.mark.parametrize('pr', [927, 341])
def test_models_as_run_are_the_recorded_ones(reference, pr):
    "In bf16, with sums in the recorded order, no logit differs."
    rows = {row[0]: row for row in check_file(reference/f'pr{pr}'/'forward_amp.npz', ALL_KINDS).rows}
    logits = [row[1] for name, row in rows.items() if name.startswith('logits')]
    assert logits and max(logits) == 0


def test_other_bits_than_the_recorded_ones(tmp_path):
    "#927's bits are settings; the range of a GPTQ file says its bits."
    w = torch.randn(8, 32)
    names = dict(fc='shared_blocks.0.mlp.fc.weight', q='shared_blocks.0.attn.c_q.weight', e='tok_emb.weight')
    for bits, expected in (((6, 0), (6, 6, 8)), ((5, 4), (4, 5, 8)), ((8, 0), (8, 8, 8))):
        assert tuple(export(927, name, w, 0, bits=bits).bits for name in names.values()) == expected
    x, grid = torch.randn(64, 32), Grid(5, 'std', unbiased=True)
    codes, steps = round_matrix(w, grid, get('loop3', 'full').quant.rounding, feedback(x.T @ x))
    arrays = dict(W=w, H=x.T @ x, q=codes, scale=steps, dequant=from_codes(codes, steps),
                  clip_sigmas=grid.clip_k, clip_range=15, block_size=128)
    np.savez(tmp_path/'gptq.npz', **{f'five/{name}': np.asarray(array) for name, array in arrays.items()})
    assert check_file(tmp_path/'gptq.npz', ALL_KINDS).verdict == 'pass'


def test_only_visits_with_xsa_leave_fp32(reference):
    "#927 as run: what a value embedding made wide is rounded by attention, unless XSA follows."
    z = opened(reference, 'pr927/forward_qat')
    for last_n, wide in ((4, {5, 6}), (1, {6}), (0, set())):
        model = as_run(model_of(z, xsa_last_n=last_n), 927)
        found = _visits_as_run(model)
        assert {v for v, weights in enumerate(found) if weights is not None} == wide


# --- refusals --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', FORWARD[:5])
def test_what_does_not_fit_is_refused_by_name(reference, name):
    z = opened(reference, name)
    pr, params, config = z.pr(), z.under('param/'), z.config()
    part = config.get('model', config)
    def changed(**keys): return config | {'model': part | keys} if 'model' in config else config | keys
    for n in list(params)[::7]:
        without = {k: w for k, w in params.items() if k != n}
        refused(lambda without=without: from_reference(pr, without, config), n, 'missing')
        refused(lambda n=n: from_reference(pr, params | {n: params[n][..., None]}, config), n, 'shape')
        whole = params | {n: np.zeros(params[n].shape, int)}
        refused(lambda whole=whole: from_reference(pr, whole, config), n, 'float')
    refused(lambda: from_reference(pr, params | {'extra.weight': np.zeros(2)}, config), 'extra.weight')
    text = params | {'tok_emb.weight': np.array('text')}
    refused(lambda: from_reference(pr, text, config), 'tok_emb.weight')
    refused(lambda: reference_config(pr, changed(attention_sinks=4)), 'attention_sinks')
    refused(lambda: reference_config(pr, changed(num_heads=0)), f'#{pr}')
    refused(lambda: reference_config(pr, changed(vocab_size='many')), 'vocab_size')
    for key in ('model_dim', 'rope_base'):
        without = {k: v for k, v in part.items() if k != key}
        refused(lambda without=without: reference_config(pr, without), key, 'missing')
    refused(lambda: reference_config(1, config), '#1 ')
    refused(lambda: next(reference_items(from_reference(pr, params, config), 2)), '#2 ')
    assert reference_config(pr, changed(ttt_lr=1, val_batch_size=3)) == reference_config(pr, config)


# --- files -----------------------------------------------------------------------------------------------

def written(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize('pr, packed', [(927, 'artifact_zstd'), (341, 'artifact_zlib')])
def test_their_artifacts(reference, tmp_path, pr, packed):
    z = opened(reference, f'pr{pr}/quantize')
    weights = load_artifact(written(tmp_path/'a', z[f'tiny/{packed}'].tobytes()), pr)
    expected = z.under('tiny/deq/')
    assert set(weights) == set(expected)
    assert all(np.array_equal(w.numpy(), expected[n]) for n, w in weights.items())


def test_the_byte_shuffled_artifact(reference, tmp_path):
    z = opened(reference, 'pr1493/quantize')
    packed = brotli.compress(shuffle_bytes(z['torchsave_bytes'].tobytes()), quality=11)
    assert len(packed) == int(z['compressed_nbytes'])
    weights = load_artifact(written(tmp_path/'a', packed), 1493)
    with torch.no_grad(): logits = from_reference(1493, weights, z.config())(z.ids('eval_ids'))
    assert np.abs(logits.numpy() - z['logits_dequant']).max() < 1e-4


def torch_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_banks_are_stacked_again(reference, tmp_path):
    z = opened(reference, 'pr1406/bank_map')
    order, banks = z.config()['flat_order'], {n: torch.from_numpy(w) for n, w in z.under('bank/').items()}
    layers = len(banks['mlp_up_bank'])
    flat = {}
    for bank, names in dict(qo_bank=('attn.c_q', 'attn.proj'), kv_bank=('attn.c_k', 'attn.c_v'),
                            mlp_up_bank=('mlp.fc',), mlp_down_bank=('mlp.proj',)).items():
        flat |= {f'blocks.{i}.{name}.weight': banks[bank][layers*k + i]
                 for k, name in enumerate(names) for i in range(layers)}
    assert set(flat) <= set(order)
    packed = lzma.compress(torch_file({'w': flat | {'bigram.scale': torch.tensor(.5)}, 'm': {}}))
    weights = load_artifact(written(tmp_path/'a', packed), 1406)
    assert all(torch.equal(weights[n], w) for n, w in banks.items()) and weights['bigram.scale'] == .5
    flat.pop('blocks.1.attn.proj.weight')
    written(tmp_path/'a', lzma.compress(torch_file({'w': flat, 'm': {}})))
    refused(lambda: load_artifact(tmp_path/'a', 1406), 'blocks.1.attn.proj.weight')


class Malice:
    def __reduce__(self): return exec, ('raise SystemExit("run by a pickle")',)


def test_hostile_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path/'a'
    for content in (torch_file({'w': Malice()}), torch_file(Malice()), b'', b'PK', torch_file([1])):
        refused(lambda c=content: load_checkpoint(written(path, c)), str(path))
        refused(lambda c=content: load_artifact(written(path, zlib.compress(c)), 341), str(path))
    refused(lambda: load_checkpoint(tmp_path/'absent'), 'absent')
    refused(lambda: load_checkpoint(written(path, torch_file({'w': 3}))), 'not a tensor')
    partial = zlib.compress(torch_file({'quantized': {}}))
    refused(lambda: load_artifact(written(path, partial), 341), 'passthrough')
    monkeypatch.setattr('golf_nb.interop.files.MAX_UNPACKED', 2**20)
    monkeypatch.setattr('golf_nb.interop.files.MAX_PACKED', 2**16)
    endless = torch_file({'w': torch.zeros(1).expand(2**20)})
    refused(lambda: load_checkpoint(written(path, endless)), 'refused')
    refused(lambda: load_checkpoint(written(path, bytes(2**20 + 1))), 'longer')
    refused(lambda: load_artifact(written(path, bytes(2**16 + 1)), 341), 'longer')
    packs = dict(zlib=zlib.compress, lzma=lzma.compress, zstd=zstandard.compress, brotli=brotli.compress)
    for pr, codec in CODEC.items():
        bomb = packs[codec](bytes(2**22))
        refused(lambda pr=pr, bomb=bomb: load_artifact(written(path, bomb), pr), 'refused')
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('archive/data.pkl', bytes(2**21))
    refused(lambda: load_checkpoint(written(path, bomb.getvalue())), 'refused')


@given(st.binary(max_size=300), st.integers(1, 255))
def test_the_byte_shuffle_comes_back(data, stride):
    shuffled = shuffle_bytes(data, stride)
    if shuffled is not data: assert unshuffle_bytes(shuffled) == data
    assert sorted(shuffled[5:] if shuffled is not data else shuffled) == sorted(data)


def test_a_damaged_vector_file_fails_and_does_not_stop_the_rest(reference, tmp_path, capsys):
    arrays = opened(reference, 'pr1640/rope').arrays
    (tmp_path/'pr1640').mkdir()
    np.savez(tmp_path/'pr1640'/'rope.npz', **arrays)
    (tmp_path/'pr1640'/'broken.npz').write_bytes(b'PK not npz')
    config = json.loads(str(arrays['config_json']))
    shorter = np.array(json.dumps({'cases': config['cases'][:1]}))
    np.savez(tmp_path/'pr1640'/'odd.npz', **arrays | {'config_json': shorter})
    assert main(['check', str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert 'broken.npz: FAIL' in said and 'rope.npz: pass' in said and 'odd.npz: not compared' in said
