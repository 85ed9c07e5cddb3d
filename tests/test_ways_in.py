"Every way in: what a user may give as data, what it becomes, and what is said when it cannot be used."
import json
import os
import re
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from golf_nb import corpus, data
from golf_nb.corpus import DataError, file_corpus, folder_corpus, read_corpus, split_text
from golf_nb.data import get_dataset, resolved_source
from golf_nb.shards import read_shard, write_shard
from golf_nb.tokenizer import (
    ByteTable,
    ByteTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    train_tokenizer,
)

ROOT = Path(__file__).parents[1]
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = [f'Story {i}: the river and the stone of house {i*i} are silent in winter.' for i in range(40)]


def one_line(error):
    "The message of an error, which must be one line."
    assert '\n' not in str(error.value)
    return str(error.value)


# --- one long text ---------------------------------------------------------------------------------------

character = st.characters(exclude_categories=['Cs'])
blocks = st.sampled_from([
    'word ', 'A line of some words.\n', '\n\n', '\r\n\r\n', ' \n \n', '## A heading\n\n', '# ', '\t', 'x',
    '\x00', '\u2581', '\ufeff', '\u2028', '\u3000', 'caf\u00e9 ', '\U0001f642', '   ', '\r'])
parts = st.tuples(blocks | st.text(character, max_size=5), st.integers(1, 400))
long_texts = st.lists(parts, max_size=30).map(lambda parts: ''.join(part*times for part, times in parts))


@given(long_texts)
@example('')
@example(' '*5_000)
@example('\n\n'*4_000)
@example('x'*10_001)
@example(' '*3_000 + 'x' + ' '*3_000)
@example('x'*2_000 + ' '*9_000 + 'y')
def test_nothing_is_lost_or_doubled_when_a_text_is_cut(text):
    pieces = split_text(text)
    size = max(len(text)//200, 1000)
    assert ''.join(pieces) == text and pieces == split_text(text)
    assert all(pieces) and (not text.strip() or all(piece.strip() for piece in pieces))
    assert all(len(piece.strip()) <= 2*size for piece in pieces)         # white space goes with a piece


@given(long_texts, long_texts, st.integers(2, 30))
@same_folder
def test_a_cut_text_is_split_by_content(tmp_path, text, more, val_every):
    "No text on both sides, all text on one, the same sides at each reading."
    text = text + more + text                                                       # so that pieces repeat
    path = tmp_path/'book.txt'
    path.write_bytes(text.encode())
    if len(set(split_text(text))) < 2:
        with pytest.raises(DataError, match='2 different ones|is empty'): file_corpus(path, val_every)
        return
    found = file_corpus(path, val_every)
    train, val = ({d.text for d in part} for part in (found.train, found.val))
    assert train and val and not train & val
    assert ''.join(d.text for d in sorted(found.train + found.val, key=lambda d: d.name)) == text
    assert file_corpus(path, val_every).identity == found.identity


def test_a_text_is_cut_at_the_best_place():
    paragraphs = 'Some words here. '*40 + '\n\n' + 'More words. '*30 + '\n\n'
    heading = ''.join(f'## Part {i}\n\n{paragraphs}' for i in range(40))
    assert all(piece.startswith('## Part') for piece in split_text(heading))
    assert all(piece[0] in 'SMP' for piece in split_text(heading.replace('## ', '')))      # paragraphs
    lines = 'A line without an empty one after it.\n'*200
    assert all(piece.startswith('A line') for piece in split_text(lines))
    assert all(piece.startswith('word') for piece in split_text('word '*2_000))
    assert {len(piece) for piece in split_text('x'*10_000)} <= {1000, 2000}


# --- files and folders -----------------------------------------------------------------------------------

def as_rows(path, texts, column='text'):
    "Write texts as a jsonl or a parquet file."
    if path.suffix == '.jsonl':
        path.write_text(''.join(json.dumps({'id': i, column: text}) + '\n' for i, text in enumerate(texts)))
    else:
        pyarrow = pytest.importorskip('pyarrow')
        from pyarrow import parquet
        parquet.write_table(pyarrow.table({'id': range(len(texts)), column: texts}), path, row_group_size=7)
    return path


def as_texts(folder, texts, suffix='.txt'):
    "Write texts as files of nested folders."
    for i, text in enumerate(texts):
        path = folder/f'{i % 3}'/f'{i % 2}'/f'{i}{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def test_all_ways_lead_to_the_same_corpus(tmp_path):
    reference = folder_corpus(as_texts(tmp_path/'txt', TEXTS))
    assert {d.text for d in reference.train + reference.val} == set(TEXTS) and reference.notes == ()
    assert all(d.name.count('/') == 2 for d in reference.train)
    ways = [as_texts(tmp_path/'md', TEXTS, '.md'), as_rows(tmp_path/'a.jsonl', TEXTS),
            as_rows(tmp_path/'a.parquet', TEXTS)]
    for suffix in ('.jsonl', '.parquet'):
        folder = tmp_path/f'folder{suffix}'/'deep'
        folder.mkdir(parents=True)
        as_rows(folder/f'1{suffix}', TEXTS[:11])
        as_rows(folder/f'2{suffix}', TEXTS[11:])
        (folder.parent/'README.md').write_text('about the tables')
        ways.append(folder.parent)
    for way in ways:
        found = read_corpus(str(way))
        assert found.identity == reference.identity and len(found.val) == 2
    assert found.notes == ('1 other files are not read: README.md',)
    (tmp_path/'txt'/'LICENSE.txt').write_text('about the texts')
    (tmp_path/'txt'/'0'/'0'/'0.txt').rename(tmp_path/'txt'/'0'/'0'/'0.TXT')
    assert folder_corpus(tmp_path/'txt').identity == reference.identity


def test_one_file_trains_as_a_folder_does(tmp_path):
    "Through the whole of it: tokenizer, shards, bytes."
    (tmp_path/'book.md').write_text('\n\n'.join(TEXTS*3))
    found = get_dataset(str(tmp_path/'book.md'), 300, tmp_path/'cache')
    assert found.notes[0].startswith('book.md: cut into') and found.identity['corpus']
    val = read_corpus(str(tmp_path/'book.md')).val
    assert found.val_original_bytes == sum(len(d.text.encode()) for d in val)
    table = as_rows(tmp_path/'a.jsonl', TEXTS, 'story')
    rows = get_dataset(str(table), 300, tmp_path/'cache', column='story')
    folder = get_dataset(str(as_texts(tmp_path/'txt', TEXTS)), 300, tmp_path/'cache')
    differ = {part for part in rows.identity if rows.identity[part] != folder.identity[part]}
    assert differ <= {'val shards'}                          # which are in the order of the names


WRONG_ROWS = {
    'no JSON': ('{"text": "a"}\n{"text": \n', 'line 2: is not JSON'),
    'a list': ('["a"]\n', 'line 1: is not an object'),
    'no column': ('{"a": 1, "b": 2}\n', "line 1: has no column 'text', but a, b; .* --data.column"),
    'a number': ('{"text": 5}\n', "row 1: column 'text' is no text but int"),
    'half a pair': ('{"text": "a\\ud800"}\n', 'half a surrogate pair'),
    'no rows': ('', 'no document|0 document'),
    'one text': ('{"text": "a"}\n{"text": "a"}\n', '2 document.* with one text'),
    'Latin-1': (b'{"text": "caf\xe9"}\n', 'is not JSON'),
}


@pytest.mark.parametrize('kind', WRONG_ROWS)
def test_wrong_rows_are_named(tmp_path, kind):
    content, part = WRONG_ROWS[kind]
    (tmp_path/'rows.jsonl').write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=part) as error: read_corpus(str(tmp_path/'rows.jsonl'))
    assert 'rows.jsonl' in one_line(error)


def test_wrong_parquet_files_are_named(tmp_path, monkeypatch):
    path = as_rows(tmp_path/'a.parquet', TEXTS, 'story')
    with pytest.raises(DataError, match="no column 'text', but id, story; ") as error: file_corpus(path)
    one_line(error)
    with pytest.raises(DataError, match='no text but int'): file_corpus(path, column='id')
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match='a.parquet: is no readable parquet file') as error: file_corpus(path)
    one_line(error)
    for name in ('pyarrow', 'pyarrow.parquet'): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r'pip install golf_nb\[tables\]') as error: file_corpus(path)
    one_line(error)


def test_rows_without_text_are_told(tmp_path):
    found = file_corpus(as_rows(tmp_path/'a.parquet', [*TEXTS, None, ' ']))
    assert found.notes == ('a.parquet: 2 of 42 rows have no text and were left out',)
    assert len(found.train + found.val) == len(TEXTS)


def test_folders_that_are_unclear(tmp_path):
    as_rows(tmp_path/'a.jsonl', TEXTS)
    as_texts(tmp_path, TEXTS)
    with pytest.raises(DataError, match='files of two kinds, .*txt and a.jsonl; move one away') as error:
        folder_corpus(tmp_path)
    one_line(error)
    for path in tmp_path.rglob('*.txt'): path.rename(path.with_suffix('.pdf'))
    (tmp_path/'.git').mkdir()
    (tmp_path/'.git'/'x.txt').write_text('hidden')
    found = folder_corpus(tmp_path)
    assert found.notes[0].startswith('40 other files are not read: 0/0/0.pdf, ')
    with pytest.raises(DataError, match='neither a folder nor a text .* rename'):
        read_corpus(str(tmp_path/'0'/'0'/'0.pdf'))


@pytest.mark.parametrize('content', ['\ufeffa BOM.\r\n', 'NUL \x00 inside', 'x'*400_000, '\u2581', '<s>'],
                         ids=range(5))
def test_odd_texts_stay_as_they_are(tmp_path, content):
    as_texts(tmp_path, [*TEXTS, content])
    found = folder_corpus(tmp_path)
    assert content in {d.text for d in found.train + found.val}


# --- tokenizers that are given ---------------------------------------------------------------------------

@pytest.fixture(scope='module')
def model(): return Tokenizer(train_tokenizer(TEXTS[:20], 310))


def test_a_given_tokenizer_encodes_documents(tmp_path, model, monkeypatch):
    model.save(tmp_path/'own.model')
    texts = as_texts(tmp_path/'txt', TEXTS)
    monkeypatch.setattr(data, 'train_tokenizer', None)
    found = get_dataset(str(texts), None, tmp_path/'cache', tmp_path/'own.model')
    assert found.vocab == 310 and found.tokenizer.fingerprint == model.fingerprint
    assert model.decode(found.val_tokens()) == ''.join(d.text for d in read_corpus(str(texts)).val)
    with pytest.raises(DataError, match=r'model.vocab: 512 .* has 310: --model.vocab 310') as error:
        get_dataset(str(texts), 512, tmp_path/'cache', tmp_path/'own.model')
    one_line(error)
    for name, part in (('absent.model', 'No such file'), ('txt', 'Is a directory')):
        with pytest.raises(DataError, match=f'^data.tokenizer: .*{part}'):
            get_dataset(str(texts), tokenizer=tmp_path/name)


def test_a_tokenizer_for_shards_that_have_none(tmp_path, model):
    shards = tmp_path/'shards'
    shards.mkdir()
    for split, texts in (('train', TEXTS[:30]), ('val', TEXTS[30:])):
        write_shard(shards/f'x_{split}_0.bin', np.concatenate([model.encode_document(t) for t in texts]))
    with pytest.raises(DataError, match='no tokenizer .*--data.tokenizer PATH') as error:
        get_dataset(str(shards))
    one_line(error)
    model.save(tmp_path/'own.model')
    found = get_dataset(str(shards), tokenizer=tmp_path/'own.model')
    assert found.vocab == 310 and found.byte_table.total(found.val_tokens()) == sum(map(len, TEXTS[30:]))


some_words = st.text('abcde ', min_size=1, max_size=30).filter(lambda text: len(text.split()) > 1)


@given(st.lists(some_words, min_size=1, max_size=6), st.sampled_from([2, 100, 256, 262, 400, 5_000, 60_000]))
@settings(max_examples=20)
def test_the_nearest_vocabulary_works(texts, vocab):
    "The number that is offered is tried."
    try: train_tokenizer(texts, vocab)
    except TokenizerError as error:
        assert str(error).startswith(f'model.vocab: {vocab} is too ')
        near = int(re.search(r'--model.vocab (\d+)$', str(error))[1])
        assert Tokenizer(train_tokenizer(texts, near)).vocab == near
        side = near - 1 if vocab < near else near + 1
        with pytest.raises(TokenizerError): train_tokenizer(texts, side)


# --- GPT-2 -----------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def gpt2_file(tmp_path_factory):
    "A vocabulary as GPT-2's, with few merges."
    pytest.importorskip('tiktoken')
    pieces = [*(bytes([i]) for i in range(256)), b' t', b'he', b' the', b'st', b'in', b'er', b'\n\n', b' s']
    path = tmp_path_factory.mktemp('gpt2')/'small.tiktoken'
    path.write_bytes(b''.join(b'%s %d\n' % (b64encode(piece), rank) for rank, piece in enumerate(pieces)))
    return path


@given(st.lists(st.text(character, max_size=30), max_size=6))
@example(['<|endoftext|>', '', ' \r\n\t', '\u2581 \x00'])
@same_folder
def test_bytes_are_counted_as_written(gpt2_file, texts):
    "No normalization: text comes back, and the table counts the bytes of the original."
    tokenizer = load_tokenizer(gpt2_file)
    stream = np.concatenate([tokenizer.encode_document('a'), *map(tokenizer.encode_document, texts)])
    assert [tokenizer.decode(tokenizer.encode_document(text)) for text in texts] == texts
    assert ByteTable.of(tokenizer).total(stream) == sum(len(text.encode()) for text in ['a', *texts])
    assert (stream == tokenizer.bos).sum() == 1 + len(texts) and stream.max() < tokenizer.vocab


def test_gpt2_shards(gpt2_file, tmp_path):
    "Shards numbered from 1, no model beside them, and documents that begin with the last id."
    tokenizer, public = load_tokenizer(gpt2_file), tmp_path/'fineweb10B'
    public.mkdir()
    parts = {'train_000001': TEXTS[:20], 'train_000002': TEXTS[20:30], 'val_000000': TEXTS[30:]}
    for name, texts in parts.items():
        tokens = np.concatenate([tokenizer.encode_document(text) for text in texts])
        write_shard(public/f'fineweb_{name}.bin', tokens)
    with pytest.raises(DataError, match='--data.tokenizer PATH, or gpt2'): get_dataset(str(public))
    found = get_dataset(str(public), tokenizer=gpt2_file)
    assert found.vocab == 265 and found.byte_table.total(found.val_tokens()) == sum(map(len, TEXTS[30:]))
    texts = as_texts(tmp_path/'txt', TEXTS)
    encoded = get_dataset(str(texts), cache=tmp_path/'cache', tokenizer=gpt2_file)
    assert get_dataset(str(encoded.train[0].parent)).fingerprint == encoded.fingerprint   # found by itself
    assert encoded.val_original_bytes == encoded.byte_table.total(encoded.val_tokens())


def test_gpt2_without_its_vocabulary_or_library(tmp_path, monkeypatch, gpt2_file):
    from tiktoken_ext import openai_public
    def offline(): raise ConnectionError('no route\nto host')
    monkeypatch.setattr(openai_public, 'gpt2', offline)
    with pytest.raises(DataError, match=r'data.tokenizer: gpt2: .*ConnectionError.* PATH.tiktoken') as error:
        get_dataset(str(tmp_path), tokenizer='gpt2')
    one_line(error)
    ranks = {bytes([i]): i for i in range(256)}
    monkeypatch.setattr(openai_public, 'gpt2', lambda: {'mergeable_ranks': ranks})
    assert load_tokenizer('gpt2').vocab == 257
    for content in (b'', b'abc', b'YQ== 0\n', gpt2_file.read_bytes()[:-3]):
        (tmp_path/'bad.tiktoken').write_bytes(content)
        with pytest.raises(TokenizerError, match='bad.tiktoken: model: not a tiktoken file') as error:
            load_tokenizer(tmp_path/'bad.tiktoken')
        one_line(error)
    for name in ('tiktoken', 'tiktoken_ext', 'tiktoken_ext.openai_public'):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ('gpt2', gpt2_file):
        with pytest.raises(TokenizerError, match=r'pip install golf_nb\[gpt2\]') as error:
            load_tokenizer(name)
        one_line(error)
    with pytest.raises(TokenizerError, match='tiktoken is not installed'): ByteTokenizer(b'')


# --- names and paths -------------------------------------------------------------------------------------

def test_a_path_holds_in_every_folder(tmp_path, monkeypatch):
    texts = as_texts(tmp_path/'here'/'texts', TEXTS)
    monkeypatch.chdir(tmp_path/'here')
    stored = resolved_source('texts')
    reference = get_dataset('./texts/', 300, tmp_path/'cache').identity
    monkeypatch.chdir(tmp_path)
    assert Path(stored) == texts and get_dataset(stored, 300, tmp_path/'cache').identity == reference
    assert all(resolved_source(name) == name for name in ('sotu', 'sotu-tune', 'fineweb'))
    (tmp_path/'fineweb').mkdir()
    assert resolved_source('fineweb') == str(tmp_path/'fineweb')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert resolved_source('~/a/../b') == str(tmp_path/'b')


def test_public_shards_by_name(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'xdg'))
    for vocab in (None, 8192):
        with pytest.raises(DataError, match=f'python -m golf_nb.data fineweb {vocab or 1024} ') as error:
            get_dataset('fineweb', vocab)
        one_line(error)
    root = tmp_path/'xdg'/'golf_nb'/'fineweb'/'data'
    (root/'tokenizers').mkdir(parents=True)
    public = root/'datasets'/'fineweb10B_sp310'
    public.mkdir(parents=True)
    model.save(root/'tokenizers'/'fineweb_310_bpe.model')
    for split in ('train', 'val'):
        write_shard(public/f'fineweb_{split}_000000.bin', model.encode_document(split))
    assert get_dataset('fineweb').train[0].parent == public
    with pytest.raises(DataError, match='--model.vocab 310'): get_dataset('fineweb', 1024)


@pytest.mark.parametrize('make, part', [
    (lambda p: None, 'data.source: .*no such file or folder'),
    (lambda p: p.mkdir(), r'no texts \(.txt, .md\), tables .* or shards'),
    (lambda p: p.write_text('a'), 'neither a folder nor a text'),
    (lambda p: (p.mkdir(), (p/'x.bin').write_bytes(b'')), 'x.bin: a file of no known role'),
    (lambda p: (p.mkdir(), [(p/f'x_{split}_0.bin').write_text(f'version https://git-lfs {split}')
                            for split in ('train', 'val')]), 'x_train_0.bin: header: .*truncated'),
    (lambda p: (p.mkdir(), (p/'a.txt').write_text('a')), 'with one text'),
], ids=range(6))
def test_sources_that_cannot_be_used(tmp_path, make, part):
    make(tmp_path/'given')
    with pytest.raises(DataError, match=part) as error:
        get_dataset(str(tmp_path/'given'), cache=tmp_path/'cache')
    assert 'given' in one_line(error)


@pytest.mark.parametrize('vocab', [-1, 0, 100_000])
def test_a_vocabulary_that_cannot_be(tmp_path, vocab):
    with pytest.raises(TokenizerError, match=f'^model.vocab: {vocab} is too ') as error:
        get_dataset(str(as_texts(tmp_path/'txt', TEXTS)), vocab, tmp_path/'cache')
    one_line(error)
    (tmp_path/'shard.bin').write_bytes(b'')
    with pytest.raises(DataError, match='give the folder of the shards'):
        get_dataset(str(tmp_path/'shard.bin'))


# --- the command -----------------------------------------------------------------------------------------

def command(*arguments, code=0, cwd=ROOT, **env):
    "Run `python -m golf_nb.data`; standard output, and standard error."
    env = os.environ | {'PYTHONPATH': str(ROOT)} | {name: str(value) for name, value in env.items()}
    done = subprocess.run([sys.executable, '-m', 'golf_nb.data', *map(str, arguments)], cwd=cwd, env=env,
                          capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_the_command_says_what_a_run_reads(tmp_path):
    as_rows(tmp_path/'rows.jsonl', [*TEXTS, ''], 'story')
    options = '--vocab', 300, '--column', 'story'
    out, _ = command('rows.jsonl', *options, cwd=tmp_path, XDG_CACHE_HOME=tmp_path/'xdg')
    found = get_dataset(str(tmp_path/'rows.jsonl'), 300, tmp_path/'xdg'/'golf_nb', column='story')
    for part in (*found.identity.values(), found.fingerprint, '--model.vocab 300',
                 f'{found.val_original_bytes:,} bytes as written', f'{len(found.val_tokens()):,} tokens',
                 'training a tokenizer of 300 pieces',
                 'encoding training text', 'encoding validation text', '38 training, 2 validation',
                 'note: rows.jsonl: 1 of 41 rows have no text'): assert part in out, part
    again, _ = command(found.train[0].parent)
    assert 'training a tokenizer' not in again
    for path in found.train[0].parent.iterdir(): assert f'  {path.name} ' in again
    assert 'validation tokens' in again and 'text about the data' in again


def test_the_command_ends_in_one_line(tmp_path):
    for arguments, code, part in ((['nowhere'], 1, 'no such file'), ([tmp_path], 1, 'no texts'),
                                  (['fineweb', '512'], 1, 'huggingface_hub is not installed')):
        out, err = command(*arguments, code=code, cwd=tmp_path)
        if part.startswith('hugging') and 'huggingface_hub' not in err: continue        # it is installed here
        assert out == '' and re.fullmatch(f'error: .*{part}.*\n', err)
    out, _ = command('--help', cwd=tmp_path)
    assert 'usage: python -m golf_nb.data' in out and 'fineweb 1024' in out
    code = 'import sys, golf_nb.data; print({"torch", "pyarrow", "tiktoken", "pandas"} & {*sys.modules})'
    assert subprocess.check_output([sys.executable, '-c', code], cwd=ROOT, text=True) == 'set()\n'


def test_a_library_call_is_silent(tmp_path, capsys):
    texts = as_texts(tmp_path/'txt', TEXTS)
    get_dataset(str(texts), 300, tmp_path/'a')
    assert capsys.readouterr() == ('', '')


def test_the_corpus_is_known_by_its_texts(tmp_path):
    "A renamed file is the same corpus; a changed word, or a text on the other side, is not."
    reference = folder_corpus(as_texts(tmp_path/'txt', TEXTS))
    paths = sorted((tmp_path/'txt').rglob('*.txt'))
    paths[3].rename(paths[3].with_name('renamed.txt'))
    assert folder_corpus(tmp_path/'txt').identity['corpus'] == reference.identity['corpus']
    assert folder_corpus(tmp_path/'txt', val_every=2).identity['corpus'] == reference.identity['corpus']
    assert folder_corpus(tmp_path/'txt', val_every=2).identity['split'] != reference.identity['split']
    paths[4].write_text('another text')
    assert folder_corpus(tmp_path/'txt').identity['corpus'] != reference.identity['corpus']
    assert corpus.sotu().identity == {'corpus': 'a5e79e264c35420b', 'split': 'f1777b7be870d932'}
    assert read_shard(get_dataset(str(tmp_path/'txt'), 300, tmp_path/'c').val[0])[0] == 1
