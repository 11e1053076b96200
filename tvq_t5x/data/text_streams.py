"""Text to tokens and back, part by part: no character is broken where one part ends."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Set
from typing import BinaryIO

import numpy as np
import seqio

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.common.tokens import FIRST_BYTE
from tvq_t5x.data import vocabularies

# What is shown where a document ends, for EOS.
DOCUMENT_END = '\n\n'
_UNKNOWN = '\ufffd'
# SentencePiece's own sign for a space.
_SPACE = '\u2581'
_BLOCK = 1 << 20
# Characters that are kept until there is a place to cut.
_LONGEST = 1 << 20


class TextDecoder:
  """Turns tokens into text as they come, each character once all of it is there."""

  def __init__(self, vocabulary: seqio.Vocabulary, continues: bytes | None = None):
    """Starts a text, or goes on where another decoder stopped.

    Args:
      vocabulary: of bytes or of SentencePiece.
      continues: the `undecoded` of that decoder; None means that a text begins.

    Raises:
      ConfigError: for another one.
    """
    texts = vocabularies.texts_of_tokens(vocabulary)
    if texts is None:
      raise ConfigError(
        f'TransformerVQModel.vocabulary = {vocabulary}: there is no text for its tokens; give a '
        'vocabulary of bytes or of SentencePiece.'
      )
    self._texts = texts
    self._ends, self._unknown = vocabulary.eos_id, vocabulary.unk_id
    self._drops_space = continues is None and _adds_space(vocabulary)
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._decoder.setstate((continues or b'', 0))

  @property
  def undecoded(self) -> bytes:
    """The bytes of a character that is not complete yet, up to three."""
    return self._decoder.getstate()[0]

  def push(self, tokens: Iterable[int]) -> str:
    """The text that is complete with these tokens, and was not before.

    Bytes that are no UTF-8 and unknown pieces become U+FFFD, EOS an empty line.
    """
    text = ''.join(self._text(int(token)) for token in tokens)
    if self._drops_space and text:
      text, self._drops_space = text.removeprefix(' '), False
    return text

  def finish(self) -> str:
    """U+FFFD, if the text ends within a character."""
    return self._decoder.decode(b'', final=True)

  def _text(self, token: int) -> str:
    if token == self._ends:
      return self.finish() + DOCUMENT_END
    if token == self._unknown:
      return self.finish() + _UNKNOWN
    return self._decoder.decode(self._texts[token] if token < len(self._texts) else b'')


def text_of(tokens: Iterable[int], vocabulary: seqio.Vocabulary) -> str:
  """The whole text of tokens, as `TextDecoder` gives it."""
  decoder = TextDecoder(vocabulary)
  return decoder.push(tokens) + decoder.finish()


def encode(text: str, vocabulary: seqio.Vocabulary, source: str) -> list[int]:
  """The tokens of a text, without EOS.

  Args:
    text: any; one that Python has from bytes that are no UTF-8 has surrogates, which are none.
    vocabulary: that may lack characters of it.
    source: of the text, for the message.

  Raises:
    ConfigError: if it does, or the text is none.
  """
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise ConfigError(
      f'{source} is no text in UTF-8 ({e.reason}, character {e.start}); give other bytes in a '
      '--prompt_file.'
    ) from e
  tokens = list(vocabulary.encode(text))
  if vocabulary.unk_id not in tokens:
    return tokens
  unknown = sorted(c for c in set(text) if vocabulary.unk_id in vocabulary.encode(c))
  shown = ', '.join(f'{c!r} (U+{ord(c):04X})' for c in unknown[:5])
  more = f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''
  raise ConfigError(f'{source}: the vocabulary has no piece for {shown}{more}; leave them out.')


def encode_file(file: BinaryIO, vocabulary: seqio.Vocabulary, source: str) -> Iterator[np.ndarray]:
  """The tokens of a text of any size, which is read in parts.

  The tokens are those of the whole text. Memory is constant with a vocabulary of bytes, and with
  one that changes no character, as `python -m tvq_t5x.train_vocab` makes them: the text is cut
  between characters that no piece has side by side. A stretch of 2**20 characters without such a
  place is cut at its end, and may have other tokens there, for the same text. With other
  vocabularies, the text is read as a whole.

  Args:
    file: of bytes, which a vocabulary of bytes takes as they are, or else text in UTF-8.
    vocabulary: of bytes or of SentencePiece.
    source: of the text, for messages.

  Yields:
    [n] int32.

  Raises:
    ConfigError: for text that is no UTF-8, or has characters that the vocabulary lacks.
  """
  yield from encode_blocks(iter(lambda: file.read(_BLOCK), b''), vocabulary, source)


def encode_blocks(
  blocks: Iterable[bytes], vocabulary: seqio.Vocabulary, source: str
) -> Iterator[np.ndarray]:
  """`encode_file` of a text that comes in blocks, none of which is empty."""
  if isinstance(vocabulary, seqio.ByteVocabulary):
    for block in blocks:
      yield np.frombuffer(block, np.uint8).astype(np.int32) + FIRST_BYTE
    return
  first = list(itertools.islice(blocks := iter(blocks), 2))
  # Short texts are never cut, and many in a corpus.
  pairs = _pairs_in_pieces(vocabulary) if len(first) > 1 else None
  blocks, rest = itertools.chain(first, blocks), ''
  for text in _texts(blocks if pairs is not None else [b''.join(blocks)], source):
    rest += text
    end = len(rest) if pairs is None else _last_cut(rest, pairs)
    part, rest = rest[:end], rest[end:]
    if part:
      yield np.asarray(encode(part, vocabulary, source), np.int32)
  if rest:
    yield np.asarray(encode(rest, vocabulary, source), np.int32)


def _texts(blocks: Iterable[bytes], source: str) -> Iterator[str]:
  """A text in UTF-8, block by block."""
  decoder = codecs.getincrementaldecoder('utf-8')()
  try:
    yield from map(decoder.decode, blocks)
    decoder.decode(b'', final=True)
  except UnicodeDecodeError as e:
    raise ConfigError(f'{source} is no text in UTF-8 ({e}).') from e


def _last_cut(text: str, pairs: Set[str]) -> int:
  """Where no piece holds what is on both sides, as late as possible; 0 is nowhere."""
  text = text.replace(_SPACE, ' ')
  for end in range(len(text) - 1, 0, -1):
    if text[end - 1 : end + 1] not in pairs:
      return end
  return len(text) if len(text) >= _LONGEST else 0


def _adds_space(vocabulary: seqio.Vocabulary) -> bool:
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return False
  return vocabularies.sentencepiece_proto(vocabulary).normalizer_spec.add_dummy_prefix


def _pairs_in_pieces(vocabulary: seqio.Vocabulary) -> Set[str] | None:
  """The pairs of characters in pieces; None if a token may depend on more than its characters."""
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return None
  model = vocabularies.sentencepiece_proto(vocabulary)
  # A word without a piece of its own becomes bytes as a whole.
  of_words = model.trainer_spec.model_type == model.trainer_spec.WORD
  if of_words or not vocabularies.is_lossless(vocabulary):
    return None
  kinds = vocabularies.Piece.NORMAL, vocabularies.Piece.USER_DEFINED, vocabularies.Piece.UNUSED
  texts = (piece.piece.replace(_SPACE, ' ') for piece in model.pieces if piece.type in kinds)
  return {text[i : i + 2] for text in texts for i in range(len(text) - 1)}
