"""Vocabularies: SentencePiece at a path set in gin, values of pixels; the bytes that tokens are."""

import hashlib
import os
from collections.abc import Callable

import gin
import numpy as np
import seqio
from sentencepiece import sentencepiece_model_pb2

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.common.tokens import FIRST_BYTE
from tvq_t5x.data import locations

Model = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
Piece = Model.SentencePiece
_TRAIN_IT = 'train one with python -m tvq_t5x.train_vocab'


@gin.configurable
def sentencepiece_model(path: str | None = None) -> str:
  """The file of the SentencePiece model, macro SENTENCEPIECE_MODEL.

  Args:
    path: of the file; None means the environment variable SENTENCEPIECE_MODEL.

  Raises:
    ConfigError: if there is no such file.
  """
  name = 'SENTENCEPIECE_MODEL'
  found = locations.path(name, path)
  if found is None:
    raise ConfigError(
      f'{name} is not set: give the path of a SentencePiece model with '
      f'{locations.how_to_set(name)}; {_TRAIN_IT}.'
    )
  if not os.path.isfile(found):
    raise ConfigError(f'{name} = {found!r}: there is no such file; {_TRAIN_IT}.')
  return found


class SentencePieceVocabulary(seqio.SentencePieceVocabulary):
  """The vocabulary at the path that `sentencepiece_model` gives when it is first used."""

  def __init__(self, model_file: Callable[[], str] = sentencepiece_model):
    """Reads nothing yet.

    Args:
      model_file: returns the path.
    """
    super().__init__('')
    self._model_file = model_file

  @property
  def sentencepiece_model_file(self) -> str:
    """The path.

    Raises:
      ConfigError: if it is not set.
    """
    return self._model_file()

  def _model_context(self):
    path = self._model_file()
    if path != self._sentencepiece_model_file:
      self._sentencepiece_model_file, self._model = path, None
    try:
      context = super()._model_context()
    except Exception as e:  # Protobuf's DecodeError, or an error of SentencePiece.
      raise ConfigError(
        f'SENTENCEPIECE_MODEL = {path!r} is not a SentencePiece model; {_TRAIN_IT}.'
      ) from e
    ids = context.tokenizer.pad_id(), context.tokenizer.eos_id()
    if ids != (0, 1):
      raise ConfigError(
        f'SENTENCEPIECE_MODEL = {path!r} has the ids {ids} of padding and EOS, not (0, 1); '
        f'{_TRAIN_IT}.'
      )
    return context

  def __eq__(self, other: object) -> bool:
    return isinstance(other, seqio.SentencePieceVocabulary) and self.sp_model == other.sp_model


class ImageVocabulary(seqio.ByteVocabulary):
  """Values of pixels as tokens, those of a `seqio.ByteVocabulary`: value + 3."""

  def __init__(self, shape: tuple[int, int, int] = (64, 64, 3)):
    """Creates the vocabulary.

    Args:
      shape: of an image: height, width, channels.
    """
    super().__init__()
    self.shape = tuple(shape)

  def images(self, tokens: np.ndarray) -> np.ndarray:
    """The images that tokens stand for.

    Args:
      tokens: [..., T] in raster order. What is no value of a pixel, or missing at the end, is
        black; what is too much is left out.

    Returns:
      [..., height, width, channels] uint8.
    """
    size = int(np.prod(self.shape))
    tokens = np.asarray(tokens)[..., :size]
    is_value = (tokens >= FIRST_BYTE) & (tokens < FIRST_BYTE + 256)
    values = np.where(is_value, tokens - FIRST_BYTE, 0).astype(np.uint8)
    missing = [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])]
    return np.pad(values, missing).reshape(*values.shape[:-1], *self.shape)

  def _encode(self, s: str) -> list[int]:
    return [value + FIRST_BYTE for value in bytes.fromhex(s)]

  def _decode(self, ids) -> str:
    """The values in hexadecimal: as text they mean nothing, and most would be dropped."""
    return bytes(i - FIRST_BYTE for i in self._filter_non_string_ids(map(int, ids))).hex()

  def __eq__(self, other: object) -> bool:
    return isinstance(other, ImageVocabulary) and self.shape == other.shape


def bytes_per_token(vocabulary: seqio.Vocabulary, vocab_size: int) -> np.ndarray | None:
  """Bytes of text, or values of pixels, that each id stands for.

  Args:
    vocabulary: of bytes, of pixels or of SentencePiece.
    vocab_size: W, at least the vocabulary's.

  Returns:
    [W] float32, 0 for padding, EOS and unknown; None for vocabularies that do not say. The sum over
    the tokens of a text is its size, with one exception: SentencePiece reads the character U+2581
    as a space. Vocabularies of SentencePiece that lose or add characters do not say.
  """
  texts = texts_of_tokens(vocabulary)
  if texts is None or not is_lossless(vocabulary):
    return None
  table = np.zeros([vocab_size], np.float32)
  table[: len(texts)] = list(map(len, texts))
  return table


def is_lossless(vocabulary: seqio.Vocabulary) -> bool:
  """Whether tokens stand for their text exactly, as far as that is known."""
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return isinstance(vocabulary, seqio.ByteVocabulary)
  model = sentencepiece_proto(vocabulary)
  rules = model.normalizer_spec
  return (
    model.trainer_spec.byte_fallback
    and not rules.precompiled_charsmap
    and not rules.add_dummy_prefix
    and not rules.remove_extra_whitespaces
  )


def texts_of_tokens(vocabulary: seqio.Vocabulary) -> list[bytes] | None:
  """The text that each id stands for, in UTF-8; a character may take several ids.

  Args:
    vocabulary: of bytes, of pixels or of SentencePiece.

  Returns:
    Empty for padding, EOS and unknown; None for vocabularies that do not say. Extra ids of a byte
    vocabulary, the highest ones, are left out.
  """
  if isinstance(vocabulary, seqio.ByteVocabulary):
    return [b''] * FIRST_BYTE + [bytes([value]) for value in range(256)]
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return None
  return list(map(_text_of_piece, sentencepiece_proto(vocabulary).pieces))


def sentencepiece_proto(vocabulary: seqio.SentencePieceVocabulary) -> Model:
  """The pieces and settings of a SentencePiece model."""
  return Model.FromString(vocabulary.sp_model)


def _text_of_piece(piece: Piece) -> bytes:
  if piece.type == Piece.BYTE:
    return bytes([int(piece.piece[1:-1], 16)])  # Such as <0x0A>.
  if piece.type not in (Piece.NORMAL, Piece.USER_DEFINED):
    return b''
  return piece.piece.replace('\u2581', ' ').encode()


def identity(vocabulary: seqio.Vocabulary) -> str:
  """A name that two vocabularies share only if they give the same tokens."""
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return f'SentencePiece {hashlib.sha256(vocabulary.sp_model).hexdigest()}'
  if isinstance(vocabulary, seqio.ByteVocabulary):
    return 'bytes'
  raise NotImplementedError(f'no name is known for {vocabulary}')
