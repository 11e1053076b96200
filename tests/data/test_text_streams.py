"""Text comes out of tokens, and goes into them, the same in parts as whole."""

import io

import numpy as np
import pytest
import seqio
from data_util import BOOKS, other_sentencepiece_model, sentencepiece_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import text_streams, vocabularies
from tvq_t5x.data.text_streams import TextDecoder, encode, encode_file, text_of

_BYTES = seqio.ByteVocabulary()
# SentencePiece writes U+2581 for a space, and reads it as one. Surrogates are no text.
_TEXT = st.text(st.characters(exclude_characters='\u2581', codec='utf-8'), max_size=30)
_CUTS = st.lists(st.integers(0, 200), max_size=5).map(sorted)
# A letter and a rocket that are no pieces.
_MULTIBYTE = 'na\u00efve \u65e5 \U0001f680\n'


@pytest.fixture(scope='module')
def pieces(tmp_path_factory):
  path = sentencepiece_model(tmp_path_factory.mktemp('pieces'))
  return vocabularies.SentencePieceVocabulary(lambda: path)


def _in_parts(vocabulary, tokens, cuts):
  """What a decoder gives for each part, its end included."""
  decoder = TextDecoder(vocabulary)
  ends = [0, *(min(cut, len(tokens)) for cut in cuts), len(tokens)]
  parts = [decoder.push(tokens[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
  return [*parts, decoder.finish()]


@pytest.mark.parametrize('text', ['caf\udce9', '\ud800', 'a\udcff\udcfe'])
def test_what_is_no_text_is_refused(pieces, text):
  for vocabulary in (_BYTES, pieces):
    with pytest.raises(ConfigError, match='^--prompt is no text in UTF-8 .*--prompt_file'):
      encode(text, vocabulary, '--prompt')


@settings(deadline=None)
@given(_TEXT, _CUTS)
def test_bytes_in_parts(text, cuts):
  parts = _in_parts(_BYTES, _BYTES.encode(text), cuts)
  assert ''.join(parts) == text
  assert not parts[-1]


@settings(deadline=None)
@given(st.one_of(_TEXT, st.lists(st.sampled_from(BOOKS), max_size=2).map(''.join)), _CUTS)
def test_pieces_in_parts(pieces, text, cuts):
  parts = _in_parts(pieces, pieces.encode(text), cuts)
  assert ''.join(parts) == text
  assert not parts[-1]


@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_a_character_comes_when_it_is_complete(kind, pieces):
  vocabulary = _BYTES if kind == 'bytes' else pieces
  decoder, shown = TextDecoder(vocabulary), ''
  steps = []
  for token in vocabulary.encode(_MULTIBYTE):
    new = decoder.push([token])
    shown += new
    steps.append(new)
    assert _MULTIBYTE.startswith(shown)
  assert shown == _MULTIBYTE
  assert steps.count('') >= 3  # The rocket has four bytes.


@given(st.binary(max_size=30), _CUTS)
def test_what_is_no_text_is_marked(data, cuts):
  tokens = [value + 3 for value in data]
  assert ''.join(_in_parts(_BYTES, tokens, cuts)) == data.decode(errors='replace')


def test_a_character_that_never_ends_is_marked(pieces):
  for vocabulary in (_BYTES, pieces):
    tokens = [i for i in vocabulary.encode('\U0001f680')][:-1]
    decoder = TextDecoder(vocabulary)
    assert decoder.push(tokens) == '' and decoder.finish() == '\ufffd'
    # EOS ends it too, and so does any text.
    assert text_of([*tokens, 1], vocabulary) == '\ufffd' + text_streams.DOCUMENT_END
    assert text_of([*tokens, *vocabulary.encode('a')], vocabulary) == '\ufffda'


@given(_TEXT, st.integers(0, 200))
def test_another_decoder_goes_on_where_one_stopped(pieces, with_prefix, text, cut):
  for vocabulary in (_BYTES, pieces, with_prefix):
    tokens = vocabulary.encode(text)
    first = TextDecoder(vocabulary)
    head = first.push(tokens[:cut])
    # Before any text, nothing is there to go on from.
    second = TextDecoder(vocabulary, first.undecoded if tokens[:cut] else None)
    assert head + second.push(tokens[cut:]) + second.finish() == text_of(tokens, vocabulary)
    assert not second.undecoded


def test_documents_end_with_an_empty_line_and_padding_is_nothing(pieces):
  for vocabulary in (_BYTES, pieces):
    a, b = vocabulary.encode('a'), vocabulary.encode('b')
    assert text_of([*a, 1, *b, 0, 0, 9999], vocabulary) == 'a\n\nb'
    assert text_of([*a, 2, *b], vocabulary) == 'a\ufffdb'


@pytest.fixture(scope='module')
def with_prefix(tmp_path_factory):
  """A vocabulary of the usual kind, which puts a space before a text, and knows few characters."""
  change = {'add_dummy_prefix': True, 'byte_fallback': False, 'vocab_size': 60}
  path = other_sentencepiece_model(tmp_path_factory.mktemp('prefix'), **change)
  return vocabularies.SentencePieceVocabulary(lambda: path)


def test_the_space_before_a_text_is_left_out(with_prefix):
  for text in ('the sea', ' the sea', '  x'):
    tokens = with_prefix.encode(text)
    assert ''.join(_in_parts(with_prefix, tokens, [0, 1])) == with_prefix.decode(tokens)


def test_characters_without_piece_are_refused(with_prefix, pieces):
  with pytest.raises(ConfigError) as error:
    encode('the sea \u65e5 \U0001f680 \u65e5', with_prefix, '--prompt')
  message = str(error.value)
  assert message.startswith('--prompt: ') and '\n' not in message
  assert "'\u65e5' (U+65E5), '\U0001f680' (U+1F680);" in message
  assert encode('\u65e5', pieces, '--prompt') == pieces.encode('\u65e5')
  assert encode('\u65e5', _BYTES, '--prompt') == _BYTES.encode('\u65e5')


def test_a_vocabulary_without_text_is_refused():
  with pytest.raises(ConfigError, match='PassThroughVocabulary'):
    TextDecoder(seqio.PassThroughVocabulary(10))


_FILE = ''.join(BOOKS) * 2 + _MULTIBYTE * 3 + 'no line feed at the end'


@pytest.mark.parametrize('block', [1, 7, 64, 1 << 20])
def test_a_file_in_blocks_has_the_tokens_of_the_whole(pieces, with_prefix, monkeypatch, block):
  monkeypatch.setattr(text_streams, '_BLOCK', block)
  text = 'the sea and the sky ' * 3
  for vocabulary, content in ((_BYTES, _FILE), (pieces, _FILE), (with_prefix, text)):
    file = io.BytesIO(content.encode())
    parts = list(encode_file(file, vocabulary, 'file'))
    np.testing.assert_array_equal(np.concatenate(parts), vocabulary.encode(content))
    if block == 7 and vocabulary is not with_prefix:
      assert len(parts) > 20


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  st.lists(st.sampled_from(['the ', 'sea', ' ', '  sky', 's', '\u00e9', '\u65e5']), max_size=20)
)
def test_one_line_in_blocks_has_the_tokens_of_the_whole(pieces, monkeypatch, words):
  monkeypatch.setattr(text_streams, '_BLOCK', 3)
  text = ''.join(words)
  parts = list(encode_file(io.BytesIO(text.encode()), pieces, 'file'))
  assert [token for part in parts for token in part] == pieces.encode(text)


class _Sizes(io.RawIOBase):
  """A file of one line, which notes how much is asked for at a time."""

  def __init__(self, content):
    self._file, self.sizes = io.BytesIO(content), []

  def read(self, size=-1):
    self.sizes.append(size)
    return self._file.read(size)


@pytest.mark.parametrize('text', ['the sea and the sky ' * 50, '0123456789' * 99, '\u65e5' * 333])
def test_a_file_without_line_feeds_is_read_in_parts(pieces, monkeypatch, text):
  monkeypatch.setattr(text_streams, '_BLOCK', 64)
  file = _Sizes(text.encode())
  parts = list(encode_file(file, pieces, 'file'))
  assert set(file.sizes) == {64}
  assert max(len(text_of(part, pieces)) for part in parts) < 100
  assert np.concatenate(parts).tolist() == pieces.encode(text)


def test_a_file_without_a_place_to_cut_is_cut_all_the_same(tmp_path, monkeypatch):
  path = sentencepiece_model(tmp_path, 265, 'x' * 1000 + 'y')
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: path)
  assert b'xx' in vocabularies.texts_of_tokens(vocabulary)
  monkeypatch.setattr(text_streams, '_BLOCK', 64)
  monkeypatch.setattr(text_streams, '_LONGEST', 100)
  parts = list(encode_file(io.BytesIO(b'x' * 1000), vocabulary, 'file'))
  assert {len(text_of(part, vocabulary)) for part in parts[:-1]} == {128}
  assert text_of(np.concatenate(parts), vocabulary) == 'x' * 1000


def test_any_bytes_are_tokens_of_a_vocabulary_of_bytes():
  (part,) = encode_file(io.BytesIO(b'\xff\x00'), _BYTES, 'file')
  assert part.tolist() == [258, 3] and part.dtype == np.int32


def test_a_file_that_is_no_text_is_refused(pieces):
  with pytest.raises(ConfigError, match='^book.txt is no text in UTF-8'):
    list(encode_file(io.BytesIO(b'text \xff'), pieces, 'book.txt'))


def test_an_empty_file_has_no_tokens(pieces):
  for vocabulary in (_BYTES, pieces):
    assert not list(encode_file(io.BytesIO(b''), vocabulary, 'file'))
