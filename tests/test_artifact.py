"Artifacts round-trip exactly, and invalid ones are refused in one line."
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from golf_nb.artifact import by_group, ledger, load, read_header, save, what_fits
from golf_nb.codecs import CODECS, ArtifactError, Part, choose_codecs, decoder_bytes, entropy_bits
from golf_nb.files import sha256
from golf_nb.quant import Codes, Grid, QuantWarning, convert, prepare

LAYOUTS = ('tensor', 'group')


def saved(path, stored, codec, layout):
    "Save; codes of low entropy may be refused by the entropy coder."
    try: return save(path, stored, codec=codec, layout=layout)
    except ArtifactError as error:
        assert 'worth at least' in str(error) and 'entropy' in codec
        assume(False)


def same(a, b):
    "Are two artifacts the same, in order, names, types, and bits?"
    def facts(part):
        if not isinstance(part, Codes): return part.dtype, part.shape, part.numpy().tobytes()
        return part.bits, part.low, *facts(part.codes), *facts(part.steps)
    a, b = ([(name, *facts(part)) for name, part in parts.items()] for parts in (a, b))
    return a == b


def fill(kind, shape, low, high, rng):
    "Codes of one kind."
    uniform = rng.integers(low, high + 1, shape).astype(np.int8)
    if kind == 'zeros': return uniform*0
    if kind == 'constant rows': return uniform*0 + uniform[..., :1]
    if kind == 'twins': return uniform*0 + uniform[:1]
    if kind == 'ends': return rng.choice([low, high], shape).astype(np.int8)
    if kind == 'uniform': return uniform
    return np.clip(np.rint(rng.normal(0, 0.3*high + 0.1, shape)), low, high).astype(np.int8)


@st.composite
def coded(draw):
    "A quantized matrix, or a tensor of any shape with one step."
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits, low = draw(st.integers(2, 8)), draw(st.booleans())
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    single = draw(st.booleans())
    shape = draw(st.sampled_from([(), (rows,), (rows, columns), (rows, 2, 3)])) if single else (rows, columns)
    kind = draw(st.sampled_from(['zeros', 'constant rows', 'twins', 'ends', 'uniform', 'normal']))
    top = 2**(bits - 1) - 1
    codes = torch.from_numpy(fill(kind, shape or (1,), -top - low, top, rng).reshape(shape))
    if single: steps = torch.tensor(draw(st.floats(0, 2.**99, width=32)))
    else:
        make = draw(st.sampled_from([steps_huge, steps_denormal, steps_usual]))
        steps = torch.from_numpy(make(rows, rng))
    return Codes(codes, steps, bits, low=low)


def steps_huge(rows, rng): return rng.uniform(1e4, 65504, rows).astype(np.float16)


def steps_denormal(rows, rng): return (rng.integers(0, 1000, rows)*2.**-24).astype(np.float16)


def steps_usual(rows, rng): return rng.lognormal(-4, 1, rows).astype(np.float32)


@st.composite
def values(draw):
    "A tensor without a grid."
    dtype = draw(st.sampled_from([torch.float16, torch.float32]))
    shape = draw(st.lists(st.integers(1, 9), max_size=4))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    return (x*draw(st.sampled_from([0., 1e-7, 1., 1e3]))).to(dtype)


names = st.text('abc.01', min_size=1, max_size=12)
artifacts = st.dictionaries(names, st.one_of(coded(), values()), max_size=4)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(stored=artifacts, codec=st.sampled_from(['auto', *CODECS]), layout=st.sampled_from(LAYOUTS))
def test_an_artifact_round_trips(tmp_path_factory, stored, codec, layout):
    path = tmp_path_factory.mktemp('a')/'a.golf'
    size = saved(path, stored, codec, layout)
    assert size == path.stat().st_size and same(load(path), stored)
    table = ledger(path)
    total = table[-1]
    assert total['coded bytes'] + total['step bytes'] == size == sum(by_group(table).values())


@pytest.mark.parametrize('codec', ['auto', *CODECS])
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(part=coded(), layout=st.sampled_from(LAYOUTS))
def test_every_codec_round_trips_every_matrix(tmp_path_factory, codec, part, layout):
    path = tmp_path_factory.mktemp('a')/'a.golf'
    stored = {'a.q': part, 'b.q': part, 'values': torch.zeros(3).half()}
    size = saved(path, stored, codec, layout)
    assert size == path.stat().st_size and same(load(path), stored)
    held = [stream for stream in read_header(path)['streams'] if stream['holds'] == 'codes']
    assert len(held) == (2 if layout == 'tensor' else 1)
    if codec != 'auto': assert {stream['codec'] for stream in held} == {codec}


@pytest.mark.filterwarnings('ignore::golf_nb.quant.QuantWarning')    # drawn weights may be nearly nothing
@quick
@given(data=st.data(), bits=st.integers(2, 8), rule=st.sampled_from(['max', 'std']))
def test_quantized_weights_round_trip(tmp_path_factory, data, bits, rule):
    "From weights: rows of zeros, constant, denormal, and huge rows."
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**32))))
    scale = data.draw(st.lists(st.sampled_from([0., 1e-40, 1e-7, 1., 1e3]), min_size=rows, max_size=rows))
    w = w*torch.tensor(scale)[:, None]
    if data.draw(st.booleans()): w[0] = 3.
    stored = convert({'blocks.0.q': w}, plan := {'blocks.0.q': Grid(bits, rule)})
    path = tmp_path_factory.mktemp('a')/'a.golf'
    assert save(path, stored, plan=plan) == path.stat().st_size and same(load(path), stored)


def test_an_empty_artifact(tmp_path):
    assert save(tmp_path/'a', {}) == (tmp_path/'a').stat().st_size and load(tmp_path/'a') == {}


@pytest.mark.parametrize('options, message', [
    ({'codec': 'rar'}, 'no codec'), ({'layout': 'row'}, 'layout'), ({'about': {'x': float('nan')}}, 'about'),
    ({'about': {'x': object()}}, 'about')])
def test_wrong_options_are_refused(tmp_path, options, message):
    with pytest.raises(ArtifactError, match=message): save(tmp_path/'a', {'w': torch.zeros(2)}, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('path', ['none', '.', 'a\0b', '/dev/zero'])
def test_paths_that_are_not_files_are_refused_in_one_line(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for reader in (load, read_header):
        with pytest.raises(ArtifactError) as error: reader(path)
        assert len(str(error.value).splitlines()) == 1


def test_the_entropy_coder_reaches_the_entropy():
    "Gaussian codes: nothing to gain, and at most half a percent to lose; no table in the stream."
    rng = np.random.default_rng(0)
    codes = np.clip(np.rint(rng.normal(0, 2.41, (512, 512))), -31, 31).astype(np.int8)
    size = len(CODECS['entropy'].pack([codes], [Part('int8', codes.shape, 6)]))
    assert size < 1.005*entropy_bits(torch.from_numpy(codes))*codes.size/8


def test_streams_are_the_same_on_every_machine():
    "Recorded hashes; a machine that computes different tables fails here, not in a reader."
    rng = np.random.default_rng(1)
    x = rng.integers(-9, 10, (60, 40)) + rng.integers(-4, 5, (60, 1))*rng.integers(-2, 3, (1, 40))
    codes = np.clip(x, -31, 31).astype(np.int8)
    found = {}
    for name, codec in CODECS.items():
        if name.startswith('entropy'):
            content = codec.pack([codes], [Part('int8', codes.shape, 6)])
            found[name] = sha256(content)[:12]
    assert found == {
        'entropy': '1b0f74fd9efd', 'entropy+turned': 'b6dbc2c4581e', 'entropy+follow256': 'fe7deb34ce15',
        'entropy+avoid1': '7056ce7d2ba2', 'entropy+avoid8': 'fca19d1b45b9'}


def test_predictions_stay_within_their_budget(monkeypatch):
    import golf_nb.codecs as module
    q = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0]
    codes = convert({'w': q}, {'w': Grid(6, 'std', 12.85)})['w'].codes.numpy()
    parts = {name: (codes, Part('int8', codes.shape, 6)) for name in 'abc'}
    assert set(choose_codecs(parts).values()) == {'entropy+avoid8'}
    monkeypatch.setattr(module, 'MAX_WORK', 1.5*CODECS['entropy+avoid8'].work(parts['a'][1]))
    assert sorted(choose_codecs(parts).values()) == ['entropy', 'entropy', 'entropy+avoid8']


def test_repeated_codes_use_a_general_codec(tmp_path):
    "A matrix of zeros, and one that repeats itself."
    pattern = np.tile(np.random.default_rng(0).integers(-31, 32, (8, 64)), (64, 4)).astype(np.int8)
    stored = {name: Codes(torch.from_numpy(codes), torch.ones(len(codes)).half(), 6)
              for name, codes in (('zeros', np.zeros((512, 256), np.int8)), ('pattern', pattern))}
    assert save(tmp_path/'a', stored) < 3000
    assert 'brotli' in {stream['codec'] for stream in read_header(tmp_path/'a')['streams']}


def test_what_fits_is_empty_for_a_file_that_fits(tmp_path):
    codes = torch.randint(-31, 32, (64, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    size = save(tmp_path/'a', {'w': Codes(codes, torch.ones(64).half(), 6)})
    assert what_fits(tmp_path/'a', size) == [] and len(what_fits(tmp_path/'a', size - 1)) == 3
    assert what_fits(tmp_path/'a', size, code_bytes=1)


def test_what_fits_is_measured_and_says_when_nothing_does(tmp_path):
    w, grid = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)), Grid(6, 'std', 12.85)
    size = save(tmp_path/'a', convert({'w': w}, {'w': grid}), {}, {'w': grid})
    for share in (0.9, 0.6):
        proposals = what_fits(tmp_path/'a', int(share*size))
        assert all(int(line.split(': ')[-1].split()[0].replace(',', '')) <= share*size for line in proposals)
        k = float(proposals[0].split('-> ')[1].split(')')[0])   # with the weights themselves
        again = {'w': Grid(6, 'std', k)}
        assert save(tmp_path/'b', convert({'w': w}, again), {}, again) <= share*size
    none, = what_fits(tmp_path/'a', 500)
    assert none.startswith('nothing of this kind fits')


def test_a_matrix_that_is_lost_is_named():
    w = {'blocks.0.q': torch.randn(64, 64), 'blocks.0.o': torch.zeros(64, 64)}
    with pytest.warns(QuantWarning, match='^blocks.0.q: all weights round to 0 on a grid of 2 bits'):
        convert(w, dict.fromkeys(w, Grid(2, 'std', 12.85)))
    model = torch.nn.Linear(64, 64, bias=False)
    with pytest.warns(QuantWarning, match='weight: all'): prepare(model, {'weight': Grid(2, 'std', 12.85)})
    convert(w, dict.fromkeys(w, Grid(2)))                   # a warning would be an error


def test_the_decoder_is_small(): assert 1000 < decoder_bytes() < 4000
