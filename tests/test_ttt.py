"Test-time training: a slow twin, the laws of scoring first, one process and two, the recorded runs."
import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from reading import one_now
from recorded import misses_when_changed

from golf_nb.config import (
    Bigram,
    ConfigError,
    ModelConfig,
    RunConfig,
    TTTConfig,
    ValueEmbed,
    from_dict,
    to_dict,
)
from golf_nb.evaluate import TAILS, merge, sliding, windows
from golf_nb.model import build
from golf_nb.presets import PRESETS, get
from golf_nb.runs import NOT_LEGAL
from golf_nb.schedule import from_order
from golf_nb.tokenizer import ByteTable
from golf_nb.ttt import (
    ScoreFirst,
    ValidationTraining,
    chunks,
    rate_factors,
    row_blocks,
    score_first,
    train_on_validation,
    training_rows,
)

VOCAB, WINDOW, STRIDE, BOS = 40, 16, 4, 1
SGD = TTTConfig('sgd', lr=0.05, chunk=32, epochs=2, batch=2)
KINDS = {
    'sgd': SGD,
    'sgd, smaller steps': replace(SGD, batch=1, momentum=0.5, cosine=False, clip=0.),
    'sgd, steps that do not divide': replace(SGD, batch=3, chunk=64),
    'part': replace(SGD, only=('cond.*', 'embed')),
    'frozen': replace(SGD, freeze_blocks=2, frozen_part='rows', first_block_rate=0.3),
    'muon': replace(SGD, update='muon', lr=0.02, momentum=0.),
    'muon with momentum': replace(SGD, update='muon', lr=0.01),
    'muon in fp32': replace(SGD, update='muon', lr=0.02, momentum=0., ns_dtype='fp32'),
    'adaptive': replace(SGD, more_above=4.1, fewer_below=3.95),
    'short chunks': replace(SGD, chunk=8, lr=0.01),
    'tied': replace(SGD, update='adapters', adapters='tied', chunk=8, rank=2, lr=0.02),
    'visit': replace(SGD, update='adapters', adapters='visit', chunk=16, rank=2, lr=0.02),
    'cold': replace(SGD, update='adapters', chunk=16, rank=2, lr=0.02, warm=False, decay=0.1),
}
SHARED = ['sgd', 'sgd, steps that do not divide', 'frozen', 'muon', 'adaptive', 'short chunks', 'visit']
NOW = ['sgd', 'frozen', 'muon', 'adaptive', 'visit']     # one of each way to adapt
every_kind = pytest.mark.parametrize('config', one_now(KINDS.values(), *map(KINDS.get, NOW)), ids=KINDS)


@pytest.fixture(scope='module')
def model():
    "A model with a loop, skips, XSA and a value embedding, none of them trivial."
    schedule = from_order([0, 1, 2, 1, 2], gated=True, xsa=[4], value_embed=[4])
    model = build(ModelConfig(schedule=schedule, vocab=VOCAB, dim=16, heads=4, kv_heads=2, hidden=24,
                              smear=True, bigram=Bigram(31, 8), value_embed=ValueEmbed(8)))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2*torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope='module')
def table():
    "Bytes of tokens that mean nothing."
    rng = np.random.default_rng(2)
    base, space = rng.integers(1, 6, VOCAB).astype(np.int16), rng.random(VOCAB) < 0.3
    return ByteTable(base, space, np.zeros(VOCAB, bool))


@pytest.fixture(scope='module')
def stream():
    "Two documents; each says the same few words again and again, with slips."
    rng = np.random.default_rng(3)
    text = np.concatenate([[BOS], np.tile(rng.integers(2, VOCAB, 9), 8)[:70], [BOS],
                           np.tile(rng.integers(2, VOCAB, 7), 12)[:75]])
    slips = rng.random(len(text)) < 0.1
    return np.where(slips & (text != BOS), rng.integers(2, VOCAB, len(text)), text)


def adapted(model, stream, config, table, **options):
    "Score and adapt, with batches that do not fit."
    return score_first(model, stream, WINDOW, STRIDE, config, bytes=table, batch=3, **options)


def plain(model, stream, table, **options):
    "The same without adapting."
    return sliding(model, stream, WINDOW, STRIDE, bytes=table, batch=3, **options)


# --- the plan -----------------------------------------------------------------------------------------------

@given(st.integers(1, 200), st.integers(1, 24), st.integers(1, 24), st.integers(1, 60), st.integers(1, 4))
def test_every_target_is_scored_once_and_before_it_is_trained_on(N, window, stride, size, world):
    if stride > window: return
    cut = windows(N, window, stride)
    plan, _ = chunks(cut, N, size)
    assert (plan[0].lo, plan[-1].hi, len(plan)) == (0, N, -(-N//size))
    assert all(a.hi == b.lo for a, b in zip(plan, plan[1:], strict=False))
    assert all(c*size == chunk.start and chunk.end <= chunk.hi for c, chunk in enumerate(plan))
    shares = [chunks(cut, N, size, 'once', rank, world) for rank in range(world)]
    assert sorted((w for _, mine in shares for w in mine), key=lambda w: w.start) == cut
    for c in range(len(plan)):                         # within a chunk, too, all its windows are shared
        own = [w for plan_, mine in shares for w in mine[plan_[c].first:plan_[c].last]]
        assert own == [w for w in cut if min(w.score//size, len(plan) - 1) == c]


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 20))
def test_training_text_ends_at_the_last_scored_target(start, length, seq):
    tokens = torch.arange(start + length + 1)
    rows, last_n = training_rows(tokens, start, start + length, seq)
    targets = rows[:, 1:] if last_n is None else rows[:, -last_n:]
    assert targets.flatten().tolist() == [*range(start + 1, start + 1 + targets.numel())]
    assert targets.numel() == (length//seq*seq or length)


def test_rows_of_blocks():
    looped = from_order([0, 1, 2, 1, 2])
    assert row_blocks(looped, 'cond') == [0, 1, 2] and row_blocks(looped, 'gain') == [0, 1, 2]
    assert row_blocks(get('cycle').model.schedule, 'cond') is None          # a row per visit
    assert row_blocks(get('cycle').model.schedule, 'gain') == [0, 1, 2, 3]
    assert row_blocks(get('hybrid').model.schedule, 'gain') is None


def test_what_is_frozen(model):
    def still(**options):
        found = rate_factors(model, **options).items()
        return {name for name, factor in found if isinstance(factor, float) and not factor}
    assert still() == set()
    matrices = ('q', 'k', 'v', 'o', 'up', 'down')
    assert still(freeze_blocks=2) == {f'blocks.{b}.{m}' for b in (0, 1) for m in matrices}
    assert still(freeze_blocks=2, frozen_part='rows') == set()
    rows = rate_factors(model, freeze_blocks=1, first_block_rate=0.5)['cond.attn_scale']
    assert rows.flatten().tolist() == [0, 0.5, 1]


# --- the laws -----------------------------------------------------------------------------------------------

@every_kind
def test_a_rate_of_zero_is_plain_scoring_to_the_last_bit(model, stream, table, config):
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = adapted(model, stream, replace(config, lr=0.), table)
    assert np.array_equal(run.nll, plain(model, stream, table).nll) and run.steps
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    none = adapted(model, stream, replace(config, epochs=0), table)
    assert np.array_equal(none.nll, run.nll) and not none.steps and set(none.epochs) == {0}


@every_kind
def test_the_first_chunk_is_plain_and_the_given_model_untouched(model, stream, table, config):
    before = {name: p.clone() for name, p in model.named_parameters()}
    run, still = adapted(model, stream, config, table), plain(model, stream, table)
    first = run.chunk == 0
    assert np.array_equal(run.nll[first], still.nll[first]) and (run.nll[~first] != still.nll[~first]).any()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert run.bytes == still.bytes and np.array_equal(run.position, still.position)
    assert abs(run.chunk_nll.sum() - math.fsum(run.nll)) < 1e-9 and run.chunk_bytes.sum() == run.bytes


@every_kind
def test_what_comes_later_does_not_matter(model, stream, table, config):
    "Future flip: with other tokens after position t, everything up to t is the same, to the last bit."
    run = adapted(model, stream, config, table)
    for t in (1, 31, 33, 71, 120):
        flipped = stream.copy()
        flipped[t + 1:] = 2 + (flipped[t + 1:] + 5) % (VOCAB - 2)
        again = adapted(model, flipped, config, table)
        assert np.array_equal(run.nll[:t], again.nll[:t]), t


@every_kind
def test_without_the_update_of_one_chunk_only_later_ones_change(model, stream, table, config):
    run, c = adapted(model, stream, config, table), 1
    machine = ScoreFirst(model, len(stream) - 1, WINDOW, STRIDE, config, batch=3)
    nll = []
    for i in range(len(machine.chunks)):
        nll.append(machine.score(i, stream)[0])
        if i != c: machine.adapt(i, stream, nll[-1].mean() if len(nll[-1]) else None)
    same = [np.array_equal(part, run.nll[run.chunk == i]) for i, part in enumerate(nll)]
    assert all(same[:c + 1]) and not all(same[c + 1:])


@every_kind
def test_scoring_changes_nothing_and_reads_no_further_than_it_must(model, stream, table, config):
    run = adapted(model, stream, config, table)
    machine = ScoreFirst(model, len(stream) - 1, WINDOW, STRIDE, config, batch=3)
    for c, chunk in enumerate(machine.chunks):
        before = {name: value.clone() for name, value in machine.state().items()}
        known = stream[:chunk.hi + 1].astype(np.uint16)
        nll, position, _ = machine.score(c, known)
        rows = np.zeros((0, VOCAB))
        if chunk.hi > chunk.lo: rows = machine.log_probs(chunk.lo, chunk.hi, known[:-1])
        after = machine.state()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert np.array_equal(nll, run.nll[run.chunk == c])
        np.testing.assert_allclose(-rows[position - chunk.lo, stream[position + 1]], nll, atol=1e-5)
        assert machine.adapt(c, known, nll.mean() if len(nll) else None) == run.epochs[c]


@every_kind
def test_the_state_is_all_that_matters(model, stream, table, config):
    "A second machine that is given the tensors of the state goes on as the first one would."
    run, half = adapted(model, stream, config, table), 2
    def machine(): return ScoreFirst(model, len(stream) - 1, WINDOW, STRIDE, config, batch=3)
    first, second = machine(), machine()
    for c in range(half):
        nll = first.score(c, stream)[0]
        first.adapt(c, stream, nll.mean() if len(nll) else None)
    second.moving.step({name: torch.zeros_like(leaf) for name, leaf in second.moving.leaves.items()}, 0.)
    ours = second.state()
    assert ours.keys() == first.state().keys()
    with torch.no_grad():
        for name, value in first.state().items(): ours[name].copy_(value)
    for c in range(half, len(second.chunks)):
        nll = second.score(c, stream)[0]
        assert np.array_equal(nll, run.nll[run.chunk == c]), c
        second.adapt(c, stream, nll.mean() if len(nll) else None)


def test_adaptation_pays_where_a_text_repeats_itself(model, stream, table):
    gains = {name: plain(model, stream, table).bpb - adapted(model, stream, config, table).bpb
             for name, config in KINDS.items()}
    assert all(gain > 0 for gain in gains.values()), gains


def test_adapters_start_anew_with_a_document(model, stream, table):
    config = KINDS['cold']
    machine = ScoreFirst(model, len(stream) - 1, WINDOW, STRIDE, config, batch=3)
    begins = [int(np.flatnonzero(stream == BOS)[1])]
    for c, chunk in enumerate(machine.chunks):
        machine.adapt(c, stream[:chunk.hi + 1])
        if chunk.start < begins[0] <= chunk.end:
            steps = [step for step in machine.steps if step.chunk == c]
            moments = [value for name, value in machine.state().items() if name.startswith('adamw/step')]
            assert steps and all(int(value) == len(steps) for value in moments)   # none from the text before
            break
    else: raise AssertionError('the second document was not found')


@pytest.mark.parametrize('tail', TAILS)
def test_every_tail_rule_adapts(model, stream, table, tail):
    run, still = adapted(model, stream, SGD, table, tail=tail), plain(model, stream, table, tail=tail)
    assert np.array_equal(run.position, still.position) and run.bytes == still.bytes
    zero = adapted(model, stream, replace(SGD, lr=0.), table, tail=tail)
    assert np.array_equal(zero.nll, still.nll)


# --- a slow twin --------------------------------------------------------------------------------------------

def slow_newton_schulz(g, steps):
    "#1406's iterations, in fp32, a matrix at a time."
    x = g/(g.norm() + 1e-7)
    if x.shape[0] > x.shape[1]: return slow_newton_schulz(g.T, steps).T
    for _ in range(steps):
        s = x @ x.T
        x = 3.4445*x + (-4.7750*s + 2.0315*(s @ s)) @ x
    return x


def slow_step(name, p, g, config, buffers, rate):
    "One parameter, after the specifications; nothing shared with the package."
    buffers[name] = config.momentum*buffers.get(name, 0) + g
    g = buffers[name]
    if config.update == 'muon':
        if name in ('cond.attn_scale', 'cond.mlp_scale', 'cond.q_gain') or p.ndim < 2: pass  # stacked vectors
        elif p.ndim == 3: g = torch.stack([slow_newton_schulz(part, config.ns_steps) for part in g])
        else: g = slow_newton_schulz(g, config.ns_steps)
    p.data -= rate*g


def slow_twin(model, stream, config):
    "Chunk by chunk: score each target with a pass of its own, then take the steps."
    model, nats, buffers, N = copy.deepcopy(model).requires_grad_(True), [], {}, len(stream) - 1
    count = -(-N//config.chunk)
    for c in range(count):
        mine = []
        for t in range(c*config.chunk, min((c + 1)*config.chunk, N)):
            start = 0 if t < WINDOW else (t - WINDOW + STRIDE)//STRIDE*STRIDE
            with torch.no_grad(): logits = model(torch.tensor(stream[None, start:t + 1]))[0, -1].double()
            mine.append((torch.logsumexp(logits, 0) - logits[stream[t + 1]]).item())
        nats += mine
        if c == count - 1: return np.array(nats), model
        epochs, mean = config.epochs, np.mean(mine)
        if config.more_above is not None and mean > config.more_above: epochs += 1
        elif config.fewer_below is not None and mean < config.fewer_below: epochs = max(epochs - 1, 1)
        rate = config.lr*(1 + math.cos(math.pi*c/(count - 1)))/2
        for _ in range(epochs):
            for i in range(c*config.chunk, (c + 1)*config.chunk, WINDOW*config.batch):
                end = min(i + WINDOW*config.batch, (c + 1)*config.chunk)
                part = torch.tensor(np.stack([stream[j:j + WINDOW + 1] for j in range(i, end, WINDOW)]))
                model.zero_grad()
                model.loss(part[:, :-1], part[:, 1:]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                for name, p in model.named_parameters():
                    if p.grad is not None: slow_step(name, p, p.grad.clone(), config, buffers, rate)


@pytest.mark.parametrize('name, weights', [('sgd', 1e-5), ('adaptive', 1e-5), ('muon', 2e-3),
                                           ('muon in fp32', 2e-5)])
def test_the_slow_twin_agrees(model, stream, table, name, weights):
    config = KINDS[name]
    run = adapted(model, stream, config, table)
    nats, final = slow_twin(model, stream, config)
    np.testing.assert_allclose(run.nll, nats, atol=0.05 if name == 'muon' else 1e-4)
    if name == 'adaptive': assert len(set(run.epochs[:-1])) > 1
    for ours, theirs in zip(run.model.parameters(), final.parameters(), strict=True):
        assert (ours - theirs).square().mean().sqrt() < weights


# --- several processes --------------------------------------------------------------------------------------

def share_of(rank, world, address, folder, given):
    "One of several processes: score and adapt, put the shares together, write what came of it."
    torch.set_num_threads(1)
    model, table, stream = given
    dist.init_process_group('gloo', init_method=f'file://{address}', rank=rank, world_size=world)
    found = {}
    for name in SHARED:
        config = KINDS[name]
        run, shares = adapted(model, stream, config, table, rank=rank, world=world), [None]*world
        state = {key: value.double().sum().item() for key, value in run.state.items()}
        dist.all_gather_object(shares, (run, state))
        whole = merge([share for share, _ in shares])
        assert all(other == state for _, other in shares), 'the processes have drifted apart'
        found[name] = dict(nll=whole.nll.tolist(), bpb=whole.bpb, epochs=run.epochs,
                           chunk_nll=run.chunk_nll.tolist())
    config = ValidationTraining(0.01, 2, 3)
    trained, losses = train_on_validation(model, stream, WINDOW, config, rank=rank, world=world)
    found['validation'] = dict(losses=losses, bpb=plain(trained, stream, table).bpb)
    if rank == 0: (folder/'found.json').write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_processes_adapt_like_one(model, table, stream, tmp_path):
    mp.spawn(share_of, (2, tmp_path/'meeting', tmp_path, (model, table, stream)), nprocs=2)
    found = json.loads((tmp_path/'found.json').read_text())
    for name in SHARED:
        config = KINDS[name]
        alone, both = adapted(model, stream, config, table), found[name]
        loose = config.update == 'muon' and config.ns_dtype == 'bf16'
        assert abs(both['bpb'] - alone.bpb) < (1e-3 if loose else 1e-5), name   # bf16 amplifies rounding
        assert both['epochs'] == [*alone.epochs], name
        np.testing.assert_allclose(both['nll'], alone.nll, atol=0.05 if loose else 1e-4)
        np.testing.assert_allclose(both['chunk_nll'], alone.chunk_nll, atol=0.5 if loose else 1e-3)
    trained, losses = train_on_validation(model, stream, WINDOW, ValidationTraining(0.01, 2, 3))
    np.testing.assert_allclose(found['validation']['losses'], losses, atol=1e-4)


# --- the recorded runs, configurations, what is not legal ---------------------------------------------------

@pytest.mark.parametrize('name, array', [
    ('pr927/ttt', 'param_final/smear.gate'), ('pr1493/ttt', 'step_lr'),
    ('pr1493/ttt_multibatch', 'per_token_chunk'),
    ('pr1406/ttt_scorefirst', 'sgd_freeze2/nll'), ('pr1406/ttt_prequant', 'final/qo_bank')])
def test_a_wrong_number_is_found(reference, name, array, tmp_path):
    assert array in misses_when_changed(reference/f'{name}.npz', array, tmp_path)


def test_presets_adapt_as_their_systems_did():
    on = {name for name, preset in PRESETS.items() if preset.scales['mini'].ttt.update != 'off'}
    assert on == {'cycle', 'loop3', 'replay-s28'}
    for name in on:
        for scale in ('full', 'mini'):
            run = get(name, scale)
            assert run.ttt.chunk % run.eval.window == 0
            assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
    assert (get('cycle', 'full').ttt.freeze_blocks, get('loop3', 'full').ttt.lr) == (1, 0.005)
    with pytest.raises(ConfigError, match='ttt.updat: unknown key; did you mean ttt.update'):
        from_dict(RunConfig, {'ttt': {'updat': 'sgd'}})


@pytest.mark.parametrize('size', [0, -5])
def test_a_chunk_has_tokens(model, stream, table, size):
    with pytest.raises(ValueError, match='ttt.chunk must be at least 1'):
        adapted(model, stream, replace(SGD, chunk=size), table)


def test_training_on_validation_says_what_it_is(model, stream, table):
    assert NOT_LEGAL == 'not a legal score'
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = ValidationTraining(lr=0.02, epochs=20, batch=4, freeze_blocks=1)
    trained, losses = train_on_validation(model, stream, WINDOW, config)
    assert losses[-1] < 0.5*losses[0]
    assert plain(trained, stream, table).bpb < 0.6*plain(model, stream, table).bpb
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(trained.cond.attn_scale[0], model.cond.attn_scale[0])            # frozen
    assert not torch.equal(trained.cond.attn_scale[1], model.cond.attn_scale[1])
    assert not torch.equal(trained.blocks[0].q, model.blocks[0].q)                      # in a bank: it moves
    assert 'not legal' in ValidationTraining.__doc__ and 'not legal' in train_on_validation.__doc__
