"Scores: every rule against a slow one of its own, every target once, the same on one process and on two."
import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from recorded import misses_when_changed

from golf_nb.config import Bigram, ModelConfig, ValueEmbed
from golf_nb.evaluate import (
    TAILS,
    Batches,
    bits_per_byte,
    fitting_stride,
    log_probs,
    merge,
    score_windows,
    sliding,
    windows,
)
from golf_nb.model import build
from golf_nb.schedule import from_order
from golf_nb.tokenizer import ByteTable

VOCAB, WINDOW = 48, 16
SIZES = st.tuples(st.integers(1, 150), st.integers(1, 32), st.integers(1, 32)).filter(lambda s: s[2] <= s[1])


@pytest.fixture(scope='module')
def model():
    "A model with a loop, skips, XSA and a value embedding, none of them trivial."
    schedule = from_order([0, 1, 2, 1, 2, 3], gated=True, xsa=[4], value_embed=[5])
    config = ModelConfig(schedule=schedule, vocab=VOCAB, dim=32, heads=4, kv_heads=2, hidden=48,
                         bigram=Bigram(31, 8), smear=True, value_embed=ValueEmbed(8))
    model = build(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2*torch.randn_like(p))
    return model.eval()


@pytest.fixture(scope='module')
def table():
    "Bytes of tokens that mean nothing."
    rng = np.random.default_rng(2)
    base = rng.integers(0, 6, VOCAB).astype(np.int16)
    return ByteTable(base, rng.random(VOCAB) < 0.3, rng.random(VOCAB) < 0.1)


@pytest.fixture(scope='module')
def stream(): return np.random.default_rng(3).integers(0, VOCAB, 131)


def spelt_out(N, T, s, tail):
    "What each window scores, as the specifications say it: (start, end, first scored), in order."
    found = []
    for start in range(0, N, s):
        whole = start + T <= N
        if tail == 'once':
            if start == 0: found.append((0, min(T, N), 0))
            elif start + T - s < N: found.append((start, min(start + T, N), start + T - s))
        elif tail in ('rescore-927', 'rescore-1406'):
            length = min(T, N - start)
            if tail == 'rescore-927' and length < s and start: continue
            found.append((start, start + length, start + (0 if start == 0 else max(length - s, 0))))
        elif tail == 'drop-341' and whole: found.append((start, start + T, start + (T - s if start else 0)))
        elif tail == 'skip-first-1640' and whole: found.append((start, start + T, start + T - s))
    return found


@given(SIZES, st.sampled_from(sorted(TAILS)))
def test_windows_are_those_of_the_specification(sizes, tail):
    N, T, s = sizes
    expected = spelt_out(N, T, s, tail)
    if not expected:
        with pytest.raises(ValueError, match='nothing to score'): windows(N, T, s, tail)
    else: assert [(w.start, w.end, w.score) for w in windows(N, T, s, tail)] == expected


@given(SIZES)
def test_every_target_is_scored_once_in_order_with_context(sizes):
    N, T, s = sizes
    scored = [(t, w) for w in windows(N, T, s) for t in range(w.score, w.end)]
    assert [t for t, _ in scored] == list(range(N))
    assert all(t - w.start + 1 >= min(t + 1, T - s + 1) and t - w.start < T for t, w in scored)


@given(SIZES, st.sampled_from(sorted(TAILS)), st.integers(1, 7))
def test_processes_share_all_windows(sizes, tail, world):
    try: cut = windows(*sizes, tail)
    except ValueError: return
    shares = [TAILS[tail].share(cut, rank, world) for rank in range(world)]
    assert sorted(sum(shares, []), key=lambda w: w.start) == cut
    if tail == 'skip-first-1640': assert shares[0] == cut[::world]
    elif tail == 'drop-341': assert [len(share) for share in shares[:-1]] == [
        min(max(len(cut) - rank*-(-len(cut)//world), 0), -(-len(cut)//world)) for rank in range(world - 1)]
    else: assert sum(shares, []) == cut and max(map(len, shares)) - min(map(len, shares)) <= 1


def slow(model, stream, window, stride, tail):
    "Nats of each target in scoring order, one forward pass a target."
    nats = []
    for start, end, first in spelt_out(len(stream) - 1, window, stride, tail):
        for t in range(first, end):
            with torch.no_grad(): logits = model(torch.tensor(stream[None, start:t + 1]))[0, -1].double()
            nats.append((torch.logsumexp(logits, 0) - logits[stream[t + 1]]).item())
    return np.array(nats)


@pytest.mark.parametrize('tail', TAILS)
@pytest.mark.parametrize('window, stride', [(16, 16), (16, 4), (13, 5), (16, 1)])
def test_scores_are_those_of_one_pass_a_target(model, table, stream, tail, window, stride):
    text = stream[:60]
    scores = sliding(model, text, window, stride, bytes=table, tail=tail, batch=3)
    np.testing.assert_allclose(scores.nll, slow(model, text, window, stride, tail), atol=2e-5)
    order = [t for start, end, first in spelt_out(59, window, stride, tail) for t in range(first, end)]
    assert scores.position.tolist() == order
    charged = [int(table.base[y]) + int(table.leading_space[y] and not table.boundary[x])
               for x, y in ((text[t], text[t + 1]) for t in order)]
    assert scores.token_bytes.tolist() == charged and scores.bytes == sum(charged)
    assert scores.bpb == math.fsum(scores.nll)/math.log(2)/sum(charged) == bits_per_byte(
        math.fsum(scores.nll), sum(charged))


@pytest.mark.parametrize('tail', TAILS)
@pytest.mark.parametrize('world', [2, 3, 5])
def test_shares_make_one_ledger(model, table, stream, tail, world):
    options = dict(bytes=table, tail=tail, batch=4)
    whole = sliding(model, stream, WINDOW, 4, **options)
    shares = [sliding(model, stream, WINDOW, 4, rank=r, world=world, **options) for r in range(world)]
    together = merge(shares)
    assert np.array_equal(together.position, whole.position) and together.bytes == whole.bytes
    assert np.array_equal(together.window, whole.window) and abs(together.bpb - whole.bpb) < 1e-6
    np.testing.assert_allclose(together.nll, whole.nll, atol=2e-6)


def test_more_processes_than_windows(model, table):
    shares = [sliding(model, np.arange(10), WINDOW, 4, bytes=table, rank=r, world=3) for r in range(3)]
    assert sorted(len(share.nll) for share in shares) == [0, 0, 9]
    assert merge(shares).position.tolist() == [*range(9)]


def test_a_score_does_not_depend_on_what_else_is_scored(model, stream):
    "To the last bit: that is what makes a rate of zero equal to plain scoring."
    cut, tokens = windows(130, WINDOW, 4), torch.tensor(stream)
    batches = Batches(cut, WINDOW, 6)
    whole, position, _ = score_windows(model, tokens, batches)
    for first, end in ((0, 1), (0, 5), (3, 8), (5, 6), (6, 12), (11, len(cut))):
        part, where, _ = score_windows(model, tokens, batches, first, end)
        assert np.array_equal(part, whole[np.isin(position, where)]), (first, end)


def test_padding_and_later_tokens_do_not_matter(model, table, stream):
    short = sliding(model, stream[:23], WINDOW, 4, bytes=table, batch=4)      # its last windows are padded
    longer = sliding(model, stream, WINDOW, 4, bytes=table, batch=4)
    np.testing.assert_allclose(short.nll, longer.nll[:22], atol=2e-6)
    for t in (1, 15, 16, 17, 64, 129):                                        # at the edges of windows too
        flipped = stream.copy()
        flipped[t + 1:] = (flipped[t + 1:] + 7) % VOCAB
        scores = sliding(model, flipped, WINDOW, 4, bytes=table, batch=4)
        assert np.array_equal(scores.nll[:t], longer.nll[:t]), t


@pytest.mark.parametrize('lo, hi', [(0, 130), (0, 1), (7, 8), (15, 17), (40, 99), (129, 130)])
def test_rows_are_complete_and_agree_with_the_scores(model, table, stream, lo, hi):
    batches = Batches(windows(130, WINDOW, 4), WINDOW, 4)
    rows = log_probs(model, stream[:hi], lo, hi, batches)
    assert rows.dtype == np.float32 and rows.shape == (hi - lo, VOCAB) and (rows <= 0).all()
    assert np.abs(np.exp(rows.astype(np.float64)).sum(1) - 1).max() < 1e-5
    scores = sliding(model, stream, WINDOW, 4, bytes=table, batch=4)
    np.testing.assert_allclose(-rows[np.arange(hi - lo), stream[lo + 1:hi + 1]], scores.nll[lo:hi], atol=1e-5)


def test_rows_need_the_tokens_before_them(model, stream):
    batches = Batches(windows(130, WINDOW, 4), WINDOW, 4)
    with pytest.raises(ValueError, match='positions up to 19 need 20 tokens'):
        log_probs(model, stream[:19], 10, 20, batches)


@pytest.mark.parametrize('words, N, window, stride, tail', [
    ('stride must be 1..8', 100, 8, 9, 'once'), ('stride must be 1..8', 100, 8, 0, 'once'),
    ('tail must be one of once', 100, 8, 8, 'twice'), ('nothing to score: 1 tokens', 0, 8, 8, 'once'),
    ('nothing to score: 6 tokens', 5, 8, 8, 'drop-341')])
def test_what_cannot_be_scored_is_said(words, N, window, stride, tail):
    with pytest.raises(ValueError, match=words): windows(N, window, stride, tail)


@given(st.integers(1, 10**6), st.sampled_from([64, 256, 96, 2048]), st.floats(1, 1e6), st.floats(0.1, 1e4))
def test_the_stride_fits_the_time(targets, window, speed, seconds):
    stride = fitting_stride(targets, window, speed, seconds)
    assert window % stride == 0 and (stride == window or targets*window/stride/speed <= seconds)


def share_of(rank, world, address, folder, given):
    "One of several processes: score a share, exchange it, write the ledger."
    torch.set_num_threads(1)
    model, table, stream = given
    dist.init_process_group('gloo', init_method=f'file://{address}', rank=rank, world_size=world)
    mine, shares = sliding(model, stream, WINDOW, 4, bytes=table, rank=rank, world=world), [None]*world
    dist.all_gather_object(shares, mine)
    whole = merge(shares)
    ledger = json.dumps([whole.nll.tolist(), whole.position.tolist(), whole.bytes])
    if rank == 0: (folder/'ledger.json').write_text(ledger)
    dist.destroy_process_group()


def test_two_processes_have_the_same_ledger(model, table, stream, tmp_path):
    mp.spawn(share_of, (2, tmp_path/'meeting', tmp_path, (model, table, stream)), nprocs=2)
    nll, position, size = json.loads((tmp_path/'ledger.json').read_text())
    alone = sliding(model, stream, WINDOW, 4, bytes=table)
    assert position == alone.position.tolist() and size == alone.bytes
    np.testing.assert_allclose(nll, alone.nll, atol=2e-6)
    assert abs(math.fsum(nll) - math.fsum(alone.nll)) < 1e-5*len(nll)


@pytest.mark.parametrize('name, array', [
    ('pr927/sliding', 'nll'), ('pr341/sliding', 'untrimmed/scored_position'),
    ('pr1640/sliding', 'world2/rank1/nll'),
    ('pr1406/sliding', 'tail/rank0/byte_count'), ('pr1493/sliding', 'per_token_window_start')])
def test_a_wrong_score_is_found(reference, name, array, tmp_path):
    assert misses_when_changed(reference/f'{name}.npz', array, tmp_path) == {array}
