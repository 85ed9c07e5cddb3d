"What can run is let through, what cannot is refused in one line, with advice that holds."
import math
import random
import statistics
import subprocess
import sys
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reading import one_now

from golf_nb.artifact import save
from golf_nb.config import Bigram, ConfigError, ModelConfig, Rounding, RunConfig, ValueEmbed, change
from golf_nb.data import DataError, get_dataset
from golf_nb.evaluate import sliding
from golf_nb.gptq import quantize
from golf_nb.limits import LimitError, check, get, put, ranged, shapes, weights
from golf_nb.model import build
from golf_nb.presets import PRESETS
from golf_nb.quant import QuantWarning, restore
from golf_nb.schedule import SYSTEMS, from_order
from golf_nb.step import Process, start, train_step
from golf_nb.ttt import score_first

MOST_FLOPS, MOST_BYTES = 3e9, 1e9      # of a case that is run


def built(model): return {name: tuple(p.shape) for name, p in build(model, 'meta').named_parameters()}


def processes(scale): return 8 if scale == 'full' else 1


PRESET_RUNS = [(name, scale) for name, preset in PRESETS.items() for scale in preset.scales]


@pytest.mark.parametrize('name, scale', PRESET_RUNS)
def test_every_preset_passes_and_is_counted_as_it_is_built(name, scale):
    config = PRESETS[name].scales[scale]
    check(config, processes(scale), memory=24 << 30)
    assert shapes(config.model) == built(config.model)


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('name', SYSTEMS)
def test_a_model_with_every_part_is_counted_as_it_is_built(name, tied):
    model = ModelConfig(schedule=SYSTEMS[name], vocab=300, dim=48, heads=6, kv_heads=2, hidden=40, smear=True,
                        tied=tied, bigram=Bigram(70, None if tied else 8, scale=1.),
                        value_embed=ValueEmbed(8, scale=1.))
    assert shapes(model) == built(model) and weights(model) == sum(map(math.prod, built(model).values()))


# --- every number of a configuration ----------------------------------------------------------------------

TINY = change(RunConfig(), **{
    'preset': 'small', 'steps': 2, 'compile': False, 'precision': 'fp32', 'prime_steps': 0,
    'model': dict(schedule=from_order([0, 1, 1, 2], per_visit={'cond'}, value_embed=[3]), vocab=300, dim=32,
                  heads=4, kv_heads=2, hidden=48, rope=dict(dims=4, reference_len=8),
                  bigram=Bigram(64, 16, scale=0.1),
                  value_embed=ValueEmbed(8, scale=0.1)),
    'data': dict(seq_len=16, batch_tokens=64, micro_batches=2),
    'optim': dict(grad_clip=1., momentum_warmup_steps=2),
    'quant': dict(min_numel=100, calibration=dict(batches=2, length=8, damping=0.05)),
    'eval': dict(window=16, stride=8, batch=4),
    'ttt': dict(update='sgd', chunk=64, batch=4, epochs=1, rank=2)})
FED = Rounding(feedback=True)
WITH = {        # what must be set besides, so that a field has an effect
    **dict.fromkeys(('seconds', 'reserve'), dict(steps=None)),
    **dict.fromkeys(('quant.clip_k', 'quant.embed_clip_k'), {'quant.scale': 'std'}),
    **dict.fromkeys(('ttt.rank', 'ttt.alpha', 'ttt.decay'), {'ttt.update': 'adapters'}),
    'ttt.ns_steps': {'ttt.update': 'muon'},
    'ttt.first_block_rate': {'ttt.frozen_part': 'rows', 'ttt.freeze_blocks': 1},
    'optim.clip_shares': {'data.micro_batches': 4},
    'optim.swa_rate': {'optim.swa_every': 1},
    'optim.decay_end': {'optim.decay_from': 0.},
    'quant.noise': {'quant.qat': 'fresh'},
    'quant.qat_floor': {'quant.qat_grid': 'max'},
    'quant.calibration': {'quant.rounding': FED},
    'quant.calibration.length': {'quant.rounding': FED, 'quant.calibration.source': 'self'},
    'quant.rounding': {'quant.rounding.half': 'after'},
    'quant.again': {'quant.again': Rounding(clip=True)}}


def around(within, whole):
    "The values of the claim: -1, 0, 1, both ends, one beyond each, NaN and infinity."
    beyond = (within.lowest - 1, within.highest + 1) if whole else \
        (within.lowest - max(abs(within.lowest), 1e-9)*1e-3, within.highest*1.001)
    kind = int if whole else float
    odd = [] if whole else [float('nan'), float('inf')]     # no whole number is like that: see below
    return [*{kind(x): 0 for x in (-1, 0, 1, within.lowest, within.highest, *beyond)}, *odd]


def cases():
    "Every field that holds numbers, with every value, in a configuration where it matters."
    for path, _, within in ranged(change(TINY, **{'quant.again': Rounding()})):
        extra = WITH.get(path) or WITH.get(path.rpartition('.')[0], {})
        base = change(TINY, **extra)
        whole = isinstance(within.lowest, int)
        for value in around(within, whole):
            now = get(base, path)
            one = path.split('.')[-1] in ('percentiles', 'visit_weights', 'depth_at')
            if isinstance(now, tuple): value = (value,) if one else (value, *now[1:])
            yield path, value, put(base, path, value)


CASES = list(cases())
SOME = random.Random(0).sample(CASES, 40)      # of them, for `make test`
ALL_OR_SOME = [pytest.param(SOME, id='some'), pytest.param(CASES, id='all', marks=pytest.mark.long)]


def judged(config):
    "The line with which a configuration is refused, if it is; and the seconds that took."
    begin = time.process_time()
    try: check(config)
    except ConfigError as error: said = str(error)
    else: said = None
    return said, time.process_time() - begin


@pytest.mark.parametrize('chosen', ALL_OR_SOME)
def test_values_outside_are_refused_in_one_line_that_names_the_option_and_quickly(chosen):
    times = []
    for path, value, config in chosen:
        said, seconds = judged(config)
        times.append(seconds)
        within = next(r for p, _, r in ranged(config) if p == path)
        number = value[0] if isinstance(value, tuple) else value
        if number in within and said is None: continue
        assert said and '\n' not in said, (path, value)
        assert path.split('.')[-1].replace('_', '-') in said.replace('_', '-'), (path, value, said)
    # with every annotation checked, as here, ten times as slow as without
    assert len(CASES) > 600 and statistics.median(times) < 0.2 and max(times) < 2


def followed(config):
    "Take the advice of each refusal until there is none; return the refusals."
    said = []
    for _ in range(12):
        try: check(config)
        except LimitError as error:
            assert error.works, error
            said.append(str(error))
            config = put(config, *next(iter(error.works.items())))
        else: return said
    raise AssertionError(said)


@pytest.mark.parametrize('chosen', ALL_OR_SOME)
def test_the_advice_works(chosen):
    for path, value, config in chosen:
        said = followed(config)
        assert len(said) <= 2, (path, value, said)


@pytest.mark.long
@given(st.lists(st.sampled_from(CASES), min_size=2, max_size=4))
def test_the_advice_leads_out_of_several_mistakes(chosen):
    config = TINY
    for path, _, other in chosen:
        part = path.rpartition('.')[0] or 'model'
        if get(config, part) is not None: config = put(config, path, get(other, path))
    followed(config)


# --- as a stranger meets it -------------------------------------------------------------------------------

WRONG = {       # what was typed, and what must be in the answer
    '--optim.lr 0.1': 'did you mean --optim.matrix-lr or',
    '--model.heads 3 --steps 2': 'a divisor of --model.dim 128; nearest that works: --model.heads 2',
    '--model.kv-heads 3 --steps 2': 'nearest that works: --model.kv-heads 2',
    '--quant.bits 9 --steps 2': 'allowed is 2..8; nearest that works: --quant.bits 8',
    '--seconds -5': '--seconds -5.0: allowed is 0.01..2,592,000',
    '--seconds abc': '--seconds abc: takes a number',
    '--steps 0': 'nearest that works: --steps 1',
    '--steps -3': 'nearest that works: --steps 1',
    '--data.batch-tokens 128 --steps 2': 'nearest that works: --data.batch-tokens 256',
    '--data.batch-tokens 1000 --steps 2': 'nearest that works: --data.batch-tokens 1024',
    '--model.schedule 0,2,2': 'numbered 0..n-1 without gaps',
    '--eval.stride 0 --steps 2': 'nearest that works: --eval.stride 1',
    '--eval.stride 100000 --steps 2': 'nearest that works: --eval.stride 256',
    '--quant.qat maybe': '--quant.qat maybe: takes one of none, ste, fresh, tied',
    '--max-bytes 1000 --steps 2': '--max-bytes 1000: allowed is at least',
    '--optim.matrix-lr nan': 'nearest that works: --optim.matrix-lr 0.02',
    '--model.dim nan': '--model.dim nan: takes a whole number 1..16,384',
    '--depth-at 0.5 0.2': 'rising shares',
    '--precision as-run': 'public system',
    '--model.vocab 100000': 'nearest that works: --model.vocab 65536'}
ASK = """
import sys
from golf_nb.train import main
try: main(sys.argv[1:])
except SystemExit as end:
    if isinstance(end.code, str): print(end.code, file=sys.stderr)
    sys.exit(3 if 'torch' in sys.modules else 2 if isinstance(end.code, int) else 1)
"""


@pytest.mark.parametrize('words', one_now(list(WRONG), '--optim.lr 0.1', '--steps -3'))
def test_a_wrong_input_is_one_line_soon_and_without_torch(words, tmp_path):
    begin = time.monotonic()
    ended = subprocess.run([sys.executable, '-c', ASK, *words.split()], cwd=tmp_path, capture_output=True,
                           text=True)
    assert WRONG[words] in ended.stderr and ended.stderr.count('\n') == 1 and not ended.stdout
    assert ended.returncode in (1, 2) and not list(tmp_path.iterdir())
    assert time.monotonic() - begin < 20                      # on an idle machine less than 1


@cache
def small_dataset():
    "A few hundred tokens."
    import tempfile
    folder = Path(tempfile.mkdtemp())
    words = ['one', 'two', 'three', 'many', 'words', 'and', 'more', 'of', 'the', 'same', 'kind']
    generator = random.Random(0)
    for i in range(40):
        text = ' '.join(generator.choice(words) for _ in range(60))
        (folder/f'{i:03}.txt').write_text(f'{text} {i}.\n')
    return get_dataset(str(folder), 300, folder/'cache')


def cost(config, targets):
    "Estimate FLOPs and bytes of what `two_steps` does."
    m, d, e, t, q = config.model, config.data, config.eval, config.ttt, config.quant
    block = 2*m.dim*m.dim + m.dim*(2*m.kv_heads*(m.dim//m.heads) + 2*m.hidden)
    applied = len(m.schedule)*block + m.vocab*m.dim
    rows = -(-targets//(e.stride or e.window)) + e.batch
    chunks = -(-targets//t.chunk)
    tokens = 2*d.batch_tokens + (rows + chunks*e.batch + t.batch)*e.window + targets*t.epochs*3
    if q.calibration.source == 'self': tokens += q.calibration.batches*q.calibration.length**2//2
    else: tokens += q.calibration.batches*d.batch_tokens
    steps = t.epochs*max(chunks, targets//e.window//t.batch)
    adapters = steps*len(m.schedule)*6*t.rank*m.dim*m.hidden*6 if t.update == 'adapters' else 0
    widest = 8*(m.vocab + 8*m.hidden + m.heads*max(e.window, d.seq_len))
    rows = max(d.batch_tokens//d.micro_batches, e.batch*e.window)
    return 6*applied*tokens + adapters + 3000*weights(m), 24*weights(m) + rows*widest


def two_steps(config, folder):
    "Train for two steps, quantize, score, and adapt."
    data = small_dataset()
    at_work = start(config, data, Process())
    for _ in range(2): train_step(at_work)
    for average in at_work.averages.values(): average.copy_to(at_work.model)
    model, at_work.model.fake_quant = at_work.model, None
    def text():
        while True: yield torch.from_numpy(np.ascontiguousarray(at_work.loader.next()[0]))
    def size(parts): return save(folder/'size', parts, codec='brotli')
    stored = quantize(model, config.quant, text(), seed=config.seed, size=size)
    size(stored)
    model.load_state_dict(restore(stored))
    tokens, scoring = data.val_tokens()[:100], config.eval
    stride = scoring.stride or scoring.window
    options = dict(bytes=data.byte_table, batch=scoring.batch)
    assert math.isfinite(sliding(model, tokens, scoring.window, stride, **options).bpb)
    if config.ttt.update != 'off': score_first(model, tokens, scoring.window, stride, config.ttt, **options)


def outcome(config, folder):
    "'refused', 'too large', 'ran', or 'refused by the data'; anything else is an error."
    said, _ = judged(config)
    if said: return 'refused'
    flops, size = cost(config, 100)
    if flops > MOST_FLOPS or size > MOST_BYTES: return 'too large'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', QuantWarning)
        try: two_steps(config, folder)
        except DataError as error:
            assert '\n' not in str(error)
            return 'refused by the data'
    return 'ran'


def tried(chosen, folder):
    "Run cases; count outcomes and collect what went wrong."
    counts, wrong = {}, []
    for path, value, config in chosen:
        try: found = outcome(config, folder)
        except Exception as error:                        # of any kind: to see them all
            found = type(error).__name__
            wrong.append((path, value, repr(error)))
        counts[found] = counts.get(found, 0) + 1
    print(counts)
    return counts, wrong


def test_what_passes_runs_for_two_steps(tmp_path):
    counts, wrong = tried(SOME[:24], tmp_path)
    assert not wrong, wrong
    assert counts['ran'] >= 4


@pytest.mark.long
def test_every_value_that_passes_runs_for_two_steps(tmp_path):
    counts, wrong = tried(CASES, tmp_path)
    assert not wrong, wrong
    assert counts['ran'] > 150 and counts['refused'] > 300
