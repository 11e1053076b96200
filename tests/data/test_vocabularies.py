"""Bytes of tokens, pixels as tokens, and a SentencePiece model at a path set in gin."""

import copy
import io

import gin
import numpy as np
import pytest
import sentencepiece
import seqio
from data_util import BOOKS, other_sentencepiece_model, sentencepiece_model
from hypothesis import given, settings
from hypothesis import strategies as st

from tvq_t5x.common import errors
from tvq_t5x.data import vocabularies

# SentencePiece writes U+2581 for a space, and reads it as one. Surrogates are no text.
_TEXT = st.text(st.characters(exclude_characters='\u2581', codec='utf-8'), max_size=60)
_LIKE_TRAINING = st.lists(st.sampled_from(BOOKS), max_size=3).map(''.join)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return sentencepiece_model(tmp_path_factory.mktemp('model'))


@pytest.fixture(autouse=True)
def _clear(monkeypatch):
  monkeypatch.delenv('SENTENCEPIECE_MODEL', raising=False)
  yield
  gin.clear_config()


@pytest.fixture(scope='module')
def vocabulary(model):
  return vocabularies.SentencePieceVocabulary(lambda: model)


@settings(deadline=None)
@given(st.one_of(_TEXT, _LIKE_TRAINING, st.tuples(_TEXT, _LIKE_TRAINING, _TEXT).map(''.join)))
def test_bytes_of_pieces_add_up_and_texts_are_restored(vocabulary, text):
  table = vocabularies.bytes_per_token(vocabulary, 304)
  ids = vocabulary.encode(text)
  assert table[ids].sum() == len(text.encode())
  assert vocabulary.decode(ids) == text


def test_bytes_of_each_kind_of_piece(vocabulary):
  table = vocabularies.bytes_per_token(vocabulary, 304)
  assert table.shape == (304,)
  assert not table[:3].any()  # Padding, EOS and unknown.
  assert not table[300:].any()
  pieces = {vocabulary.tokenizer.id_to_piece(i): table[i] for i in range(300)}
  assert [pieces[piece] for piece in ('\n', '<0x00>', '<0xE4>', '\u2581', 'the')] == [1, 1, 1, 1, 3]
  assert pieces['\u2581the'] == 4


def test_bytes_of_bytes():
  table = vocabularies.bytes_per_token(seqio.ByteVocabulary(extra_ids=5), 270)
  assert table.tolist() == [0] * 3 + [1] * 256 + [0] * 11


@pytest.mark.parametrize(
  'change',
  [
    {'add_dummy_prefix': True},
    {'remove_extra_whitespaces': True},
    {'normalization_rule_name': 'nmt_nfkc'},
    {'byte_fallback': False, 'vocab_size': 60},
  ],
)
def test_a_lossy_vocabulary_does_not_say(tmp_path, change):
  path = other_sentencepiece_model(tmp_path, **change)
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: path)
  assert vocabularies.bytes_per_token(vocabulary, 300) is None


def test_other_vocabularies_do_not_say():
  assert vocabularies.bytes_per_token(seqio.PassThroughVocabulary(9), 9) is None


def test_the_path_is_asked_for_when_it_is_needed(model, tmp_path, monkeypatch):
  vocabulary = vocabularies.SentencePieceVocabulary()
  with pytest.raises(errors.ConfigError, match='SENTENCEPIECE_MODEL is not set.*train_vocab'):
    len(vocabulary.encode('the sea'))
  monkeypatch.setenv('SENTENCEPIECE_MODEL', str(tmp_path / 'none'))
  with pytest.raises(errors.ConfigError, match='SENTENCEPIECE_MODEL = .*no such file.*train_vocab'):
    len(vocabulary.encode('the sea'))
  monkeypatch.setenv('SENTENCEPIECE_MODEL', model)
  assert vocabulary.vocab_size == 300
  # gin's setting holds, and another path another model.
  other = sentencepiece_model(tmp_path, 295)
  gin.bind_parameter('tvq_t5x.data.vocabularies.sentencepiece_model.path', other)
  assert vocabulary.vocab_size == 295
  assert vocabulary.sentencepiece_model_file == other


def test_what_is_no_model_is_refused(tmp_path):
  path = tmp_path / 'text.model'
  path.write_text('no model')
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: str(path))
  with pytest.raises(errors.ConfigError, match='is not a SentencePiece model'):
    len(vocabulary.encode('the sea'))


def test_a_model_with_other_special_ids_is_refused(tmp_path):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(''.join(BOOKS).split('\n')),
    model_writer=model,
    vocab_size=300,
    model_type='bpe',
    byte_fallback=True,
    minloglevel=2,
  )
  path = tmp_path / 'other.model'
  path.write_bytes(model.getvalue())
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: str(path))
  with pytest.raises(
    errors.ConfigError, match=r'the ids \(-1, 2\) of padding and EOS, not \(0, 1\)'
  ):
    len(vocabulary.encode('the sea'))


def test_sentencepiece_vocabularies_are_equal_if_their_models_are(model, tmp_path):
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: model)
  again = vocabularies.SentencePieceVocabulary(lambda: model)
  assert vocabulary == again == copy.deepcopy(again)
  assert vocabulary == seqio.SentencePieceVocabulary(model)
  other = sentencepiece_model(tmp_path, 295)
  assert vocabulary != vocabularies.SentencePieceVocabulary(lambda: other)
  assert vocabulary != seqio.ByteVocabulary()


def test_images_are_restored_exactly():
  vocabulary = vocabularies.ImageVocabulary((4, 5, 3))
  images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3)).astype(np.uint8)
  tokens = images.reshape(2, -1).astype(np.int32) + 3
  np.testing.assert_array_equal(vocabulary.images(tokens), images)
  assert vocabulary.images(tokens).dtype == np.uint8
  assert vocabulary.encode(vocabulary.decode(tokens[0].tolist())) == tokens[0].tolist()


def test_images_of_what_a_model_may_write():
  vocabulary = vocabularies.ImageVocabulary((1, 2, 3))
  rows = [[3, 258, 0, 1, 2, 259], [8, 9, 10]]
  assert vocabulary.images(rows[0]).ravel().tolist() == [0, 255, 0, 0, 0, 0]
  assert vocabulary.images(rows[1]).ravel().tolist() == [5, 6, 7, 0, 0, 0]
  assert vocabulary.images(rows[0] + [9]).shape == (1, 2, 3)


def test_image_vocabularies_are_equal_if_their_shapes_are():
  assert vocabularies.ImageVocabulary((4, 5, 3)) == vocabularies.ImageVocabulary((4, 5, 3))
  assert vocabularies.ImageVocabulary((4, 5, 3)) != vocabularies.ImageVocabulary((5, 4, 3))
  assert vocabularies.ImageVocabulary((4, 5, 3)) != seqio.ByteVocabulary()
