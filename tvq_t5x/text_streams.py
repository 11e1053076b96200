"""Text to tokens and back, part by part: no character is broken where one part ends."""

import codecs
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import seqio

from tvq_t5x import vocabularies
from tvq_t5x.errors import ConfigError

# What is shown where a document ends, for EOS.
DOCUMENT_END = '\n\n'
_UNKNOWN = '\ufffd'
_BLOCK = 1 << 20


class TextDecoder:
  """Turns tokens into text as they come, each character once all of it is there."""

  def __init__(self, vocabulary: seqio.Vocabulary):
    """Starts a text.

    Args:
      vocabulary: of bytes or of SentencePiece.

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
    self._drops_space = _adds_space(vocabulary)
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

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
    text: any.
    vocabulary: that may lack characters of it.
    source: of the text, for the message.

  Raises:
    ConfigError: if it does.
  """
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
  one in which no piece spans lines, as `python -m tvq_t5x.train_vocab` makes them; with others, the
  text is read as a whole.

  Args:
    file: of bytes, which a vocabulary of bytes takes as they are, or else text in UTF-8.
    vocabulary: of bytes or of SentencePiece.
    source: of the text, for messages.

  Yields:
    [n] int32.

  Raises:
    ConfigError: for text that is no UTF-8, or has characters that the vocabulary lacks.
  """
  if isinstance(vocabulary, seqio.ByteVocabulary):
    while block := file.read(_BLOCK):
      yield np.frombuffer(block, np.uint8).astype(np.int32) + vocabularies.FIRST_BYTE
    return
  by_line, rest = _keeps_lines_apart(vocabulary), b''
  while True:
    block = file.read(_BLOCK if by_line else -1)
    rest += block
    # A line feed is a piece of its own: nothing before it depends on what comes after it.
    end = rest.rfind(b'\n') + 1 if block and by_line else len(rest)
    part, rest = rest[:end], rest[end:]
    if part:
      yield np.asarray(encode(_utf8(part, source), vocabulary, source), np.int32)
    if not block:
      return


def _utf8(text: bytes, source: str) -> str:
  try:
    return text.decode()
  except UnicodeDecodeError as e:
    raise ConfigError(f'{source} is no text in UTF-8 ({e}).') from e


def _adds_space(vocabulary: seqio.Vocabulary) -> bool:
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return False
  return vocabularies.sentencepiece_proto(vocabulary).normalizer_spec.add_dummy_prefix


def _keeps_lines_apart(vocabulary: seqio.Vocabulary) -> bool:
  if not isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return False
  model = vocabularies.sentencepiece_proto(vocabulary)
  return vocabularies.is_lossless(vocabulary) and any(
    piece.piece == '\n' and piece.type == vocabularies.Piece.USER_DEFINED for piece in model.pieces
  )
