"""Bytes of tokens, pixels as tokens, and a SentencePiece model at a path set in gin."""

import copy
import io
import pathlib

import gin
import numpy as np
import pytest
import sentencepiece
import seqio
from data_util import BOOKS, ODD_NAME, other_sentencepiece_model, processor, sentencepiece_model
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from tvq_t5x.common import errors
from tvq_t5x.data import datasets, vocabularies
from tvq_t5x.data.vocabularies import Piece

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


@pytest.mark.parametrize('damage', ['text', 'cut', 'not UTF-8'])
def test_what_is_no_model_is_refused(tmp_path, model, damage):
  whole = pathlib.Path(model).read_bytes()
  path = tmp_path / 'broken.model'
  path.write_bytes(
    {
      'text': b'no model',
      'cut': whole[: len(whole) // 2],
      'not UTF-8': whole.replace(b'<0xFA>', b'<0x\xc6A>'),
    }[damage]
  )
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
  assert vocabulary != seqio.SentencePieceVocabulary(model, extra_ids=2)
  other = sentencepiece_model(tmp_path, 295)
  assert vocabulary != vocabularies.SentencePieceVocabulary(lambda: other)
  assert vocabulary != seqio.ByteVocabulary()


def _changed(model, folder, change):
  """The model with one thing changed, of another file."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(pathlib.Path(model).read_bytes())
  change(proto)
  path = folder / 'changed.model'
  path.write_bytes(proto.SerializeToString())
  return vocabularies.SentencePieceVocabulary(lambda: str(path))


@pytest.mark.parametrize(
  ('change', 'is_same'),
  [
    (lambda proto: setattr(proto.trainer_spec, 'num_threads', 3), True),
    (lambda proto: proto.trainer_spec.input.append('/my/folder/text.txt'), True),
    (lambda proto: setattr(proto.normalizer_spec, 'name', 'mine'), True),
    (lambda proto: setattr(proto.pieces[290], 'piece', 'zzz'), False),
    (lambda proto: setattr(proto.pieces[290], 'score', -1e6), False),
    (lambda proto: setattr(proto.pieces[290], 'type', Piece.UNUSED), False),
    (lambda proto: setattr(proto.normalizer_spec, 'add_dummy_prefix', True), False),
    (lambda proto: setattr(proto.trainer_spec, 'model_type', 1), False),
  ],
  ids=['threads', 'input', 'name', 'piece', 'score', 'type', 'prefix', 'model'],
)
def test_a_vocabulary_is_known_by_its_pieces_and_rules(model, tmp_path, change, is_same):
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: model)
  other = _changed(model, tmp_path, change)
  assert (vocabularies.identity(vocabulary) == vocabularies.identity(other)) == is_same
  assert (vocabulary == other) == is_same


class _Shifted(seqio.PassThroughVocabulary):
  """A user's own."""

  def _decode(self, ids):
    return [i + 1 for i in ids]


def _others(folder):
  words = [folder / f'words{i}.txt' for i in range(2)]
  for i, path in enumerate(words):
    path.write_text('\n'.join(['[PAD]', '[UNK]', 'sea', 'sky', *['ship'] * i]))
  return [
    seqio.ByteVocabulary(),
    seqio.ByteVocabulary(1),
    vocabularies.ImageVocabulary((4, 4, 3)),
    vocabularies.ImageVocabulary((4, 3, 4)),
    seqio.PassThroughVocabulary(9),
    seqio.PassThroughVocabulary(10),
    seqio.PassThroughVocabulary(9, eos_id=1),
    _Shifted(9),
    seqio.UnigramVocabulary(['sea', 'sky']),
    seqio.UnigramVocabulary(['sky', 'sea']),
    seqio.FullCodepointVocabulary(),
    seqio.PartialCodepointVocabulary([65, 66]),
    seqio.PartialCodepointVocabulary([66, 65]),
    seqio.BertWordPieceVocabulary(str(words[0])),
    seqio.BertWordPieceVocabulary(str(words[0]), lower_case=True),
    seqio.BertWordPieceVocabulary(str(words[1])),
  ]


def test_every_vocabulary_has_an_identity(tmp_path):
  (tmp_path / 'again').mkdir()
  first, second = _others(tmp_path), _others(tmp_path / 'again')
  names = list(map(vocabularies.identity, first))
  assert len(set(names)) == len(names)
  assert names == list(map(vocabularies.identity, second))


def test_a_bound_vocabulary_stays_what_it_is(model, tmp_path):
  path = tmp_path / 'some.model'
  path.write_bytes(pathlib.Path(model).read_bytes())
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: str(path))
  bound = vocabulary.bound()
  path.write_bytes(pathlib.Path(sentencepiece_model(tmp_path, 295)).read_bytes())
  assert (bound.vocab_size, copy.deepcopy(bound).vocab_size, vocabulary.vocab_size) == (
    300,
    300,
    295,
  )
  assert bound.sentencepiece_model_file == str(path)


def test_two_models_in_one_process(model, tmp_path):
  """What is configured second changes nothing of the first."""
  found, text = [], 'the sea and the sky'
  for path in (model, sentencepiece_model(tmp_path, 295)):
    gin.clear_config()
    gin.bind_parameter('tvq_t5x.data.vocabularies.sentencepiece_model.path', path)
    found.append(datasets.vocabulary('kjv_sentencepiece', 'tvq_t5x.tasks.kjv_sentencepiece'))
    assert list(found[-1].encode(text)) == processor(path).encode(text)
  assert list(found[0].encode(text)) == processor(model).encode(text)
  assert found[0] != found[1]


def test_that_there_is_no_vocabulary_is_told_when_it_is_used():
  vocabulary = datasets.vocabulary('kjv_sentencepiece', 'tvq_t5x.tasks.kjv_sentencepiece')
  with pytest.raises(errors.ConfigError, match='SENTENCEPIECE_MODEL is not set'):
    vocabulary.encode('the sea')


def test_any_name_of_a_file(model, tmp_path, monkeypatch):
  path = tmp_path / ODD_NAME / f'{ODD_NAME}.model'
  path.parent.mkdir()
  path.write_bytes(pathlib.Path(model).read_bytes())
  monkeypatch.setenv('SENTENCEPIECE_MODEL', str(path))
  assert vocabularies.SentencePieceVocabulary().vocab_size == 300


def test_ids_that_a_model_may_write(tmp_path, model):
  def ids(vocabulary, size):
    found = vocabularies.sampled_ids(vocabulary, size)
    assert found.shape == (size,) and found.dtype == bool
    return np.flatnonzero(found).tolist()

  assert ids(seqio.ByteVocabulary(), 264) == [1, *range(3, 259)]
  # They may have been put into the texts.
  assert ids(seqio.ByteVocabulary(2), 264) == [1, *range(3, 261)]
  assert ids(vocabularies.ImageVocabulary(), 264) == list(range(3, 259))
  assert ids(seqio.PassThroughVocabulary(9), 16) == list(range(1, 9))
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: model)
  assert ids(vocabulary, 304) == [1, *range(3, 300)]
  unused = _changed(model, tmp_path, lambda proto: setattr(proto.pieces[290], 'type', Piece.UNUSED))
  assert ids(unused, 304) == [1, *range(3, 290), *range(291, 300)]
  # Where characters may be unknown, texts have the id that says so.
  lossy = other_sentencepiece_model(tmp_path, byte_fallback=False, vocab_size=60)
  assert ids(vocabularies.SentencePieceVocabulary(lambda: lossy), 64) == list(range(1, 60))


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
