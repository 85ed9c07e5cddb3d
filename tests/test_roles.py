"What each file of a folder of shards is for, by random folders; and bytes that a sidecar counts."
import os
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golf_nb.audit.stream import Stream, bytes_row, flipped, other_bytes, renamed
from golf_nb.config import TTTConfig
from golf_nb.corpus import DataError
from golf_nb.data import Dataset, describe, get_dataset
from golf_nb.evaluate import sliding
from golf_nb.model import build
from golf_nb.presets import get
from golf_nb.shards import (
    PUBLIC_SETS,
    choose_tokenizer,
    compare_with_public,
    content_hash,
    read_shard,
    refuse_copies,
    shard_folder,
    shard_roles,
    write_shard,
)
from golf_nb.study.compounding import text_of
from golf_nb.tokenizer import TRAINER_OPTIONS, ByteTable, SidecarBytes, Tokenizer, TokenizerError
from golf_nb.ttt import score_first

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent/'shared'/'cases'/'caseops'
MARK = '\ue001'                        # a capital letter follows
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)


def one_line(error):
    "The message of an error, which must be one line."
    assert '\n' not in str(error.value)
    return str(error.value)


# --- random folders --------------------------------------------------------------------------------------

stems = st.sampled_from(['', 'fineweb_', 'my text_', 'a_b_', 'bytes_', '\u00e9_'])
others = st.sets(st.sampled_from(['README.md', 'LICENSE', 'a.model', 'a.vocab', 'dataset.json', 'docs.jsonl',
                                  'texts.txt', '.hidden.bin', '.lock', 'notes.log', 'manifest.json']))
plans = st.fixed_dictionaries(dict(
    stem=stems, first=st.integers(0, 1), width=st.sampled_from([1, 6]), train=st.integers(1, 4),
    val=st.integers(1, 3), sidecars=st.booleans(), others=others, seed=st.integers(0, 999)))


def name_of(plan, split, number, bytes=False):
    "The name of a shard, or of its sidecar."
    return f'{plan["stem"]}{split}_{"bytes_"*bytes}{number:0{plan["width"]}}.bin'


def make(folder, plan):
    "Write the folder of a plan anew; return the roles that its files should have."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rng, expected = np.random.default_rng(plan['seed']), {}
    for split in ('train', 'val'):
        for number in range(plan['first'], plan['first'] + plan[split]):
            tokens = rng.integers(0, 9, rng.integers(20, 60))      # never twice the same
            write_shard(folder/name_of(plan, split, number), tokens)
            expected[name_of(plan, split, number)] = split
            if plan['sidecars'] and split == 'val':
                write_shard(folder/name_of(plan, split, number, True), np.full(len(tokens), 2))
                expected[name_of(plan, split, number, True)] = 'val bytes'
    for name in plan['others']: (folder/name).write_text('x')
    return expected


@given(plans)
@same_folder
def test_every_file_has_its_role(tmp_path, plan):
    folder = tmp_path/'f'
    expected = make(folder, plan)
    found = shard_roles(folder)
    refuse_copies(found)
    roles = {path.name: role for role, paths in found.items() for path in paths}
    assert len(roles) == sum(map(len, found.values()))             # no file has two
    assert {*roles} == {p.name for p in folder.iterdir() if p.name[0] != '.'}
    assert {name: role for name, role in roles.items() if name.endswith('.bin')} == expected
    assert all(list(paths) == sorted(paths) for paths in found.values())


def gap(folder, plan):
    "One shard is lost between two."
    number = plan['first'] + plan['train'] + 1
    write_shard(folder/name_of(plan, 'train', number), [1, 2])
    return f'number {number - 1} before it is missing'


def late(folder, plan):
    "The first shards are lost."
    for number in range(plan['first'], plan['first'] + plan['val']):
        for bytes in (False, True):
            path = folder/name_of(plan, 'val', number, bytes)
            if path.exists(): path.rename(folder/name_of(plan, 'val', number + 5, bytes))
    return 'number 1 before it is missing'


def copied(folder, plan):
    "A shard once more, under the next number."
    first = folder/name_of(plan, 'train', plan['first'])
    shutil.copy(first, folder/name_of(plan, 'train', plan['first'] + plan['train']))
    return f'has the content of {first.name}'


def leaked(folder, plan):
    "A validation shard with the name of a training shard."
    held_out = folder/name_of(plan, 'val', plan['first'])
    shutil.copy(held_out, folder/name_of(plan, 'train', plan['first'] + plan['train']))
    return f'is the validation shard {held_out.name}'


def stray(folder, plan):
    "A sidecar whose shard is not there."
    write_shard(folder/name_of(plan, 'val', 99, True), [1, 2])
    return f'without its shard {name_of(plan, "val", 99)}'


def short(folder, plan):
    "A sidecar of another length."
    write_shard(folder/name_of(plan, 'val', plan['first'], True), [1])
    return '1 byte counts for'


def bare(folder, plan):
    "A validation shard that alone has no sidecar."
    for number in range(plan['first'], plan['first'] + plan['val']):
        count = len(read_shard(folder/name_of(plan, 'val', number)))
        write_shard(folder/name_of(plan, 'val', number, True), np.full(count, 2))
    write_shard(folder/name_of(plan, 'val', plan['first'] + plan['val']), [1, 2, 3])
    return 'has no byte sidecar'


def swapped(folder, plan):
    "The tokens themselves where the byte counts should be."
    for number in range(plan['first'], plan['first'] + plan['val']):
        shutil.copy(folder/name_of(plan, 'val', number), folder/name_of(plan, 'val', number, True))
    return 'would count twice'


def nameless(folder, plan):
    "A file of no known role."
    names = ['fineweb_val_weights_0.bin', 'x.bin', 'fineweb_val_000000 (1).bin', 'a_train_0.bin.part',
             'val.npy', 'a_val_train_0.bin', 'train_0.BIN', 'shard_train_.bin', 'tokens.gz']
    write_shard(folder/names[plan['seed'] % len(names)], [1])
    return 'no known role'


@pytest.mark.parametrize('fault', [gap, late, copied, leaked, stray, short, bare, swapped, nameless])
@given(plans)
@same_folder
def test_a_fault_is_named(tmp_path, fault, plan):
    folder = tmp_path/'f'
    make(folder, plan)
    part = fault(folder, plan)
    with pytest.raises(DataError) as error: refuse_copies(shard_roles(folder))
    assert part in one_line(error) and str(folder) in str(error.value)


@given(st.integers(1, 200_000), st.integers(0, 2**32), st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_hash_of_a_large_file_is_a_sample_of_it(tmp_path, count, seed, data):
    tokens = np.random.default_rng(seed).integers(0, 65_536, count)
    write_shard(tmp_path/'a.bin', tokens)
    same, size = content_hash(tmp_path/'a.bin'), 1024 + 2*count
    assert content_hash(tmp_path/'a.bin') == same
    at = data.draw(st.sampled_from([0, 1, count//2, count - 1]))
    tokens[min(at, count - 1)] ^= 1
    write_shard(tmp_path/'b.bin', tokens)
    sampled = size <= 66*4096 or at in (0, 1, count - 1)
    if sampled: assert content_hash(tmp_path/'b.bin') != same
    write_shard(tmp_path/'b.bin', np.append(tokens, 0))
    assert content_hash(tmp_path/'b.bin') != same


def test_equal_samples_are_compared_byte_by_byte(tmp_path):
    "Two shards that differ only between the blocks are two shards."
    tokens = np.random.default_rng(0).integers(0, 9, 500_000)
    other = tokens.copy()
    other[10_000] += 1
    for name, content in (('t_train_0', tokens), ('t_train_1', other), ('t_val_0', tokens[9:])):
        write_shard(tmp_path/f'{name}.bin', content)
    assert content_hash(tmp_path/'t_train_0.bin') == content_hash(tmp_path/'t_train_1.bin')
    refuse_copies(shard_roles(tmp_path))
    write_shard(tmp_path/'t_train_1.bin', tokens)
    with pytest.raises(DataError, match='would count twice'): refuse_copies(shard_roles(tmp_path))


# --- a text that was rewritten before it was encoded -----------------------------------------------------

WORDS = ('river stone light house garden silver window morning letter bridge winter summer copper anchor '
         'meadow harbour').split()


def written(seed, words=150):
    "A document with capitals."
    rng = np.random.default_rng(seed)
    return ' '.join(w.capitalize() if rng.random() < .25 else w for w in rng.choice(WORDS, words).tolist())


def folded(text):
    "The document as CaseOps writes it: a mark and a small letter for each capital."
    return ' '.join(MARK + w.lower() if w[:1].isupper() else w for w in text.split(' '))


@pytest.fixture(scope='module')
def marked():
    "A tokenizer with the mark as a user-defined piece."
    out = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(folded(written(seed)) for seed in range(30)), model_writer=out, vocab_size=330,
        user_defined_symbols=[MARK], minloglevel=2, **TRAINER_OPTIONS)
    return Tokenizer(out.getvalue())


@pytest.fixture(scope='module')
def recipe(marked, tmp_path_factory):
    "Shards as such a recipe leaves them, two for validation; and the bytes of its text."
    folder = tmp_path_factory.mktemp('recipe')
    def encoded(seeds):
        tokens, worth = [], []
        for seed in seeds:
            ids = marked.encode_document(folded(written(seed))).tolist()
            tokens += ids
            worth += [0 if i == 1 else len(marked._sp.id_to_piece(i).replace('\u2581', ' ').replace(MARK, ''))
                      for i in ids]
        return tokens, worth
    write_shard(folder/'fineweb_train_000000.bin', encoded(range(40))[0])
    for number, seeds in enumerate((range(100, 104), range(104, 108))):
        tokens, worth = encoded(seeds)
        write_shard(folder/f'fineweb_val_{number:06}.bin', tokens)
        write_shard(folder/f'fineweb_val_bytes_{number:06}.bin', worth)
    marked.save(folder/'marked.model')
    return folder, sum(len(written(seed).encode()) for seed in range(100, 108))


def test_a_sidecar_is_the_byte_count(recipe, marked):
    folder, true = recipe
    found = get_dataset(str(folder))
    tokens = found.val_tokens()
    assert found.val_original_bytes == found.byte_table.total(tokens) == true and found.vocab == 330
    assert len(tokens) == sum(len(read_shard(p)) for p in folder.glob('fineweb_val_0*.bin'))
    assert len(found.val) == len(found.sidecars) == 2
    assert isinstance(found.byte_table, ByteTable)
    assert found.byte_table.by_piece.total(tokens) == true               # the mark is worth nothing here too
    assert found.identity['byte table'] == found.byte_table.fingerprint
    assert f'{true:,} bytes by the sidecar' in describe(str(folder), found)
    for part in (tokens[1:], tokens[::-1], tokens + 1):
        with pytest.raises(TokenizerError, match='not the text of the sidecar|outside'):
            found.byte_table.total(part)
    assert found.byte_table.total(tokens[:50]) == found.byte_table.counts[1:50].sum()


def test_marks_without_a_sidecar_are_refused(recipe, marked, tmp_path):
    for path in recipe[0].iterdir():
        if '_bytes_' not in path.name: shutil.copy(path, tmp_path)
    with pytest.raises(TokenizerError, match=r'4 \(U\+E001\).*sidecar \(\*_val_bytes_') as error:
        get_dataset(str(tmp_path))
    one_line(error)
    texts = tmp_path/'texts'
    texts.mkdir()
    for i in range(3): (texts/f'{i}.txt').write_text(written(i))
    with pytest.raises(TokenizerError, match=r'U\+E001'):
        get_dataset(str(texts), tokenizer=recipe[0]/'marked.model', cache=tmp_path/'cache')
    assert not (tmp_path/'cache').exists()


def test_a_sidecar_that_counts_marks_is_believed(recipe, marked, tmp_path):
    "Then the mark is text, also where there is no sidecar."
    shutil.copytree(recipe[0], tmp_path/'f')
    for path in (tmp_path/'f').glob('*_bytes_*'):
        tokens = read_shard(path.with_name(path.name.replace('_bytes', '')))
        write_shard(path, np.where(tokens == 4, 3, read_shard(path)))
    with pytest.raises(TokenizerError, match=r'U\+E001'): _ = get_dataset(str(tmp_path/'f')).byte_table


class Guess(torch.nn.Module):
    "Gives every token the same probability."
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def token_nats(self, tokens, targets, last_n=None, **options):
        return torch.ones(targets.shape, dtype=torch.float32)[:, -(last_n or targets.shape[1]):]


@pytest.mark.parametrize('window, stride, world', [(64, 64, 1), (64, 16, 1), (48, 12, 3), (7, 7, 2)])
def test_scores_are_counted_by_the_sidecar(recipe, window, stride, world):
    found, true = get_dataset(str(recipe[0])), recipe[1]
    parts = [sliding(Guess(), found.val_tokens(), window, stride, bytes=found.byte_table, rank=rank,
                     world=world) for rank in range(world)]
    assert sum(part.bytes for part in parts) == true
    for part in parts: assert (part.token_bytes == found.byte_table.counts[part.position + 1]).all()


def test_every_other_count_of_the_validation_text(recipe):
    found, true = get_dataset(str(recipe[0])), recipe[1]
    tokens = found.val_tokens()
    assert text_of(tokens[:1025], 64, bytes=found.byte_table).bytes == found.byte_table.counts[1:1025].sum()
    assert text_of(read_shard(found.train[0])[:65], 64, bytes=found.byte_table.by_piece).bytes > 0
    config = get('tiny').model
    model = build(replace(config, vocab=found.vocab, dim=32, hidden=32, heads=2, kv_heads=1), 'cpu')
    adapted = score_first(model, tokens, 128, 128, TTTConfig(chunk=1024, epochs=1), bytes=found.byte_table)
    assert adapted.bytes == true


def test_the_auditor_counts_by_the_sidecar(recipe, marked):
    found, true = get_dataset(str(recipe[0])), recipe[1]
    stream = Stream(found.val_tokens().astype(np.int64), found.byte_table)
    assert stream.token_bytes(0, len(stream)).sum() == true
    rng = np.random.default_rng(0)
    for other in (flipped(stream, 100, rng), renamed(stream, rng, 200)):          # other text: by pieces
        assert other.token_bytes(0, len(other)).sum() > 0 and not isinstance(other.byte_table, SidecarBytes)
    assert other_bytes([1, 2]) == [1, 2]
    assert bytes_row(stream, marked).verdict == 'undecided'
    stream.wipe(0)                                                    # a sidecar holds the text too
    assert not found.byte_table.tokens.any() and not found.byte_table.counts.any()


def test_the_identity_of_shards(recipe, tmp_path):
    "A change of each part is seen in that part."
    reference = get_dataset(str(recipe[0])).identity
    assert {*reference} == {'tokenizer', 'byte table', 'train shards', 'val shards'}
    assert all(len(digest) == 16 for digest in reference.values())
    def changed(pattern, change):
        shutil.rmtree(tmp_path/'f', ignore_errors=True)
        shutil.copytree(recipe[0], tmp_path/'f')
        path = min((tmp_path/'f').glob(pattern))
        write_shard(path, change(read_shard(path).astype(int)))
        found = get_dataset(str(tmp_path/'f')).identity
        return {part for part in reference if found[part] != reference[part]}
    assert changed('*_train_0*', lambda tokens: tokens) == set()      # another folder: the same data
    assert changed('*_train_0*', lambda tokens: tokens[:-1]) == {'train shards'}
    assert changed('*_val_0*', lambda tokens: np.r_[tokens[:5], 300, tokens[6:]]) == {'val shards'}
    assert changed('*_val_bytes_*', lambda worth: worth + (np.arange(len(worth)) == 3)) == {'byte table'}


# --- where tokenizers stand, and the public sets ---------------------------------------------------------

def test_the_layout_of_a_download(recipe, marked, tmp_path):
    root = tmp_path/'golf'
    for kind in ('8192', '8192_cased'):
        public = root/'data'/'datasets'/f'fineweb10B_sp{kind}'
        public.mkdir(parents=True)
        for path in recipe[0].glob('*.bin'): shutil.copy(path, public)
    models = root/'data'/'tokenizers'
    models.mkdir()
    marked.save(models/'fineweb_8192_bpe_cased.model')
    other = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(written(seed) for seed in range(30)), model_writer=other, vocab_size=330,
        minloglevel=2, **TRAINER_OPTIONS)
    Tokenizer(other.getvalue()).save(models/'fineweb_8192_bpe.model')
    cased, plain = (root/'data'/'datasets'/f'fineweb10B_sp{kind}' for kind in ('8192_cased', '8192'))
    assert choose_tokenizer(cased).fingerprint == marked.fingerprint
    assert choose_tokenizer(cased, 330).fingerprint == marked.fingerprint
    assert choose_tokenizer(plain).fingerprint != marked.fingerprint  # of two with as many pieces
    assert get_dataset(str(cased)).tokenizer.fingerprint == marked.fingerprint
    for above in (root, root/'data', root/'data'/'datasets'):
        with pytest.raises(DataError, match='holds 2 data sets: .*_sp8192, .*cased; choose') as error:
            shard_folder(above)
        assert '--data.source' in one_line(error)
    shutil.rmtree(plain)
    for above in (root, root/'data', root/'data'/'datasets', cased): assert shard_folder(above) == cased
    with pytest.raises(DataError, match='--model.vocab 330') as error: get_dataset(str(root), 6144)
    one_line(error)


@pytest.mark.parametrize('known', PUBLIC_SETS)
def test_a_public_set_that_is_shorter_is_told(known):
    def told(targets, bytes=None):
        return compare_with_public([Path('fineweb_val_0.bin')], known.vocab, known.marked, targets, bytes)
    whole = known.targets//2048*2048
    assert told(known.targets, known.bytes) is told(whole) is told(whole + 2047) is None
    for targets in (0, 9_662_464, whole - 1): assert f'{targets:,} targets, less than' in told(targets)
    assert 'more' in told(whole + 2048)
    if known.bytes: assert f'{known.bytes - 1:,} bytes' in told(known.targets, known.bytes - 1)


def test_the_totals_of_the_public_sets():
    "As public logs have them, whole or cut to rows of 2,048 targets."
    assert {known.targets for known in PUBLIC_SETS} == {62_021_632, 40_540_160, 47_853_343}
    assert {known.targets//2048*2048 for known in PUBLIC_SETS} == {62_021_632, 40_540_160, 47_851_520}
    assert [known.bytes for known in PUBLIC_SETS if known.bytes] == [151_080_645]


@pytest.mark.skipif(not CASES.is_dir(), reason='needs the public tokenizer beside this checkout')
def test_the_public_case_tokenizer():
    found = get_dataset(str(CASES/'with'))
    tokens = found.val_tokens()
    assert (len(tokens), found.val_original_bytes, found.byte_table.total(tokens)) == (14_693, 54_982, 54_982)
    assert found.vocab == 8192 and 'CaseOps' in found.notes[0]
    with pytest.raises(TokenizerError, match=r'U\+E001.*U\+E004'):
        get_dataset(str(CASES/'without'), tokenizer=CASES/'with'/'caseops.model')


def test_what_is_told_of_other_files(recipe, tmp_path):
    shutil.copytree(recipe[0], tmp_path/'f')
    (tmp_path/'f'/'texts.jsonl').write_text('{}')
    assert any('texts.jsonl' in note for note in get_dataset(str(tmp_path/'f')).notes)
    assert isinstance(get_dataset(str(tmp_path/'f')), Dataset) and os.listdir(tmp_path) == ['f']
