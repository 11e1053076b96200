"""Vocabularies: SentencePiece at a path set in gin, values of pixels; what ids stand for."""

import copy
import functools
import hashlib
import json
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import sentencepiece
import seqio
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.common.tokens import FIRST_BYTE
from tvq_t5x.data import locations
from tvq_t5x.gin_support.configurables import configurable

Model = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]
Piece = Model.SentencePiece
sentencepiece.set_min_log_level(1)  # Warnings: of each model it would tell how it is normalized.
_TRAIN_IT = 'train one with python -m tvq_t5x.train_vocab'


@configurable
def sentencepiece_model(path: str | None = None, required: bool = True) -> str:
  """The file of the SentencePiece model, macro SENTENCEPIECE_MODEL.

  Args:
    path: of the file, which may lie in a bucket; None means the environment variable
      SENTENCEPIECE_MODEL.
    required: whether it has to be set.

  Returns:
    The path; '' if it is not set and need not be.

  Raises:
    ConfigError: if there is no such file.
  """
  name = 'SENTENCEPIECE_MODEL'
  found = locations.path(name, path)
  if found is None:
    if not required:
      return ''
    raise ConfigError(
      f'{name} is not set: give the path of a SentencePiece model with '
      f'{locations.how_to_set(name)}; {_TRAIN_IT}.'
    )
  if not epath.Path(found).is_file():
    raise ConfigError(f'{name} = {found!r}: there is no such file; {_TRAIN_IT}.')
  return found


class _Model(NamedTuple):
  """A SentencePiece model, as `seqio.SentencePieceVocabulary` keeps it."""

  tokenizer: sentencepiece.SentencePieceProcessor
  sp_model: bytes


class SentencePieceVocabulary(seqio.SentencePieceVocabulary):
  """The vocabulary in the file that `sentencepiece_model` names, asked for at each use.

  A task has one, and so has the vocabulary that is configured when the task is read. What lives on
  when the configuration is another one, as a model does, has a `bound` one.
  """

  def __init__(self, model_file: Callable[[], str] = sentencepiece_model):
    """Reads nothing yet.

    Args:
      model_file: returns the path.
    """
    super().__init__('')
    self._model_file = model_file
    self._bound_to: bytes | None = None

  def bound(self) -> Self:
    """The vocabulary of the file as it is now, whatever is configured or lies there later.

    That there is no file is said where the vocabulary is used: not all that have one use it.
    """
    found = copy.copy(self)
    try:
      path = self._model_file()
      found._model_file, found._bound_to = lambda: path, _read(path)
    except ConfigError as e:
      found._model_file = functools.partial(_refuse, e)
    return found

  @property
  def sentencepiece_model_file(self) -> str:
    """The path.

    Raises:
      ConfigError: if it is not set.
    """
    return self._model_file()

  def _model_context(self) -> _Model:
    path = self._model_file()
    return _load(_read(path) if self._bound_to is None else self._bound_to, path)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, seqio.SentencePieceVocabulary) and identity(self) == identity(other)


def _refuse(error: ConfigError) -> str:
  raise error


def _read(path: str) -> bytes:
  return epath.Path(path).read_bytes()


_loading = threading.Lock()  # SentencePiece loads one model at a time, or crashes.


@functools.lru_cache(maxsize=8)
def _load(model: bytes, path: str) -> _Model:
  tokenizer = sentencepiece.SentencePieceProcessor()
  try:
    with _loading:
      tokenizer.LoadFromSerializedProto(model)
  # The second where its message quotes bytes of the file.
  except (RuntimeError, UnicodeDecodeError) as e:
    raise ConfigError(
      f'SENTENCEPIECE_MODEL = {path!r} is not a SentencePiece model; {_TRAIN_IT}.'
    ) from e
  ids = tokenizer.pad_id(), tokenizer.eos_id()
  if ids != (0, 1):
    raise ConfigError(
      f'SENTENCEPIECE_MODEL = {path!r} has the ids {ids} of padding and EOS, not (0, 1); '
      f'{_TRAIN_IT}.'
    )
  return _Model(tokenizer, model)


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


def sampled_ids(vocabulary: seqio.Vocabulary, vocab_size: int) -> np.ndarray:
  """The ids that a model may write: those that occur in the tokens of texts or images.

  Args:
    vocabulary: any; of one that does not say what its ids are, all but padding are taken.
    vocab_size: W, at least the vocabulary's.

  Returns:
    [W] bool. False for padding, for unknown where each byte has an id, for SentencePiece's control
    and unused pieces, for EOS in a vocabulary of pixels, and for ids that the vocabulary lacks.
  """
  ids = np.arange(vocab_size) < vocabulary.vocab_size
  texts = texts_of_tokens(vocabulary)
  if texts is None:
    ids[vocabulary.pad_id] = False
    return ids
  ids[: len(texts)] = list(map(bool, texts))
  ids[vocabulary.eos_id] = not isinstance(vocabulary, ImageVocabulary)
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    ids[vocabulary.unk_id] = not sentencepiece_proto(vocabulary).trainer_spec.byte_fallback
  return ids


def identity(vocabulary: seqio.Vocabulary) -> str:
  """A name that two vocabularies share if they have the same ids for the same texts, or else not.

  It follows from pieces and rules, not from where or how the vocabulary was made.
  """
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return f'SentencePiece {_sentencepiece_digest(vocabulary.sp_model)}'
  if isinstance(vocabulary, ImageVocabulary):
    return f'pixels {" x ".join(map(str, vocabulary.shape))}'
  if type(vocabulary) is seqio.ByteVocabulary:
    return f'bytes, {vocabulary.extra_ids} extra ids' if vocabulary.extra_ids else 'bytes'
  if isinstance(vocabulary, seqio.FullCodepointVocabulary):
    return 'code points'
  name = f'{type(vocabulary).__module__}.{type(vocabulary).__qualname__}'
  ids = vocabulary.vocab_size, vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id
  if isinstance(vocabulary, seqio.BertWordPieceVocabulary):
    # What is in its file, and its settings; to decode each id would take minutes.
    simple = bytes | str | bool | int | None
    content = {name: x for name, x in vars(vocabulary).items() if isinstance(x, simple)}
    del content['_vocab_lookup_table']  # The path.
  else:
    content = [_decoded(vocabulary, i) for i in range(vocabulary.vocab_size)]
  return f'{name} {_digest([ids, content])}'


def difference(old: str, new: str) -> str:
  """What to say where two `identity` differ: of a model, of the present configuration."""
  hint = ' (the file is that of SENTENCEPIECE_MODEL)' if new.startswith('SentencePiece ') else ''
  setting = 'TransformerVQModel.vocabulary'
  if new.endswith(' classes'):
    setting = 'ClassifierModel.task_format'
  return f'{setting} is {new}{hint}, there {old}'


@functools.lru_cache(maxsize=8)
def _sentencepiece_digest(model: bytes) -> str:
  """Of all that decides which tokens a text has, and which text tokens have."""
  proto = Model.FromString(model)
  rules, settings = proto.normalizer_spec, proto.trainer_spec
  return _digest(
    [
      [[piece.piece, piece.score, piece.type] for piece in proto.pieces],
      [rules.precompiled_charsmap, proto.denormalizer_spec.precompiled_charsmap],
      [rules.add_dummy_prefix, rules.remove_extra_whitespaces, rules.escape_whitespaces],
      [settings.model_type, settings.byte_fallback, settings.treat_whitespace_as_suffix],
      [settings.pad_piece, settings.eos_piece, settings.unk_piece, settings.unk_surface],
    ]
  )


def _decoded(vocabulary: seqio.Vocabulary, token: int) -> Any:
  try:
    return vocabulary.decode([token])
  except Exception:  # A user's vocabulary may refuse some ids.
    return None


def _digest(content: Any) -> str:
  text = json.dumps(content, default=lambda x: x.hex() if isinstance(x, bytes) else str(x))
  return hashlib.sha256(text.encode()).hexdigest()
