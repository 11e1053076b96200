"""Training of SentencePiece vocabularies from which every text can be restored exactly."""

import codecs
import dataclasses
import io
import re
import time
from collections.abc import Iterable, Iterator

from absl import logging

from tvq_t5x.common.errors import ConfigError

# Characters; SentencePiece drops longer lines without a word.
_LONGEST_LINE = 16_384
# It drops lines that have what it writes between words, and ends them where C does.
_RESERVED = '\u2585\0'
# The bytes that are no UTF-8, as `surrogateescape` has them.
_NOT_UTF8 = re.compile('[\udc80-\udcff]')


@dataclasses.dataclass
class LeftOut:
  """What of a text a vocabulary is not trained on; it is encoded all the same, as bytes.

  Attributes:
    reserved: characters that SentencePiece keeps for itself, U+2585 and NUL.
    not_utf8: bytes that are no text in UTF-8.
  """

  reserved: int = 0
  not_utf8: int = 0

  def __str__(self) -> str:
    """In words; '' for nothing."""
    parts = []
    if self.reserved:
      parts.append(f'{self.reserved:,} times U+2585 or NUL, which SentencePiece keeps for itself')
    if self.not_utf8:
      parts.append(f'{self.not_utf8:,} bytes that are no UTF-8')
    return ', and '.join(parts)


def train(text: Iterable[bytes], vocab_size: int) -> bytes:
  """Trains a vocabulary of byte-pair encoding that keeps texts as they are.

  No character is changed or dropped: those that have no piece become bytes, and a line feed is a
  piece of its own. The one exception is U+2581, which SentencePiece itself writes for a space.

  Args:
    text: lines in UTF-8 without their ends, as `lines` gives them.
    vocab_size: pieces; padding is 0, EOS 1, unknown 2, and there is a piece for each byte.

  Returns:
    The model, as `SentencePieceProcessor` reads it; the same for the same text on any machine.

  Raises:
    ConfigError: if the text has too few different words, or too many different characters.
  """
  import sentencepiece

  model, start = io.BytesIO(), time.monotonic()
  failures: list[Exception] = []

  def sentences() -> Iterator[bytes]:
    try:
      yield from text
    except Exception as e:
      failures.append(e)  # SentencePiece makes its own error of it.
      raise

  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=sentences(),
      model_writer=model,
      vocab_size=vocab_size,
      model_type='bpe',
      character_coverage=1.0,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      byte_fallback=True,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      user_defined_symbols=['\n'],
      max_sentence_length=4 * _LONGEST_LINE,  # In bytes.
      num_threads=16,  # The model says how many there were.
      minloglevel=2,
    )
  except RuntimeError as e:
    if failures:
      raise failures[0] from None
    raise _refusal(e, vocab_size) from e
  logging.info('Trained in %d seconds.', time.monotonic() - start)
  return model.getvalue()


def _refusal(error: RuntimeError, vocab_size: int) -> Exception:
  """What SentencePiece means."""
  if found := re.search(r'set it to a value <= (\d+)', str(error)):
    return ConfigError(
      f'--vocab_size={vocab_size}: there is too little text for so many pieces; give '
      f'--vocab_size={found[1]} or less, or more text.'
    )
  if found := re.search(r'\d+ vs (\d+)\. Increase vocab_size', str(error)):
    return ConfigError(
      f'--vocab_size={vocab_size}: the characters of the text and 256 bytes need more pieces; give '
      f'--vocab_size={found[1]} or more.'
    )
  if 'sentences_.empty()' in str(error):
    return ConfigError('there is no text to train on: give another --input or --task')
  return error


def lines(blocks: Iterable[bytes], left_out: LeftOut | None = None) -> Iterator[bytes]:
  """The lines of a text that comes in blocks, without their ends and without empty ones.

  Args:
    blocks: of any size; their boundaries don't matter.
    left_out: counts what is in no line.

  Yields:
    lines in UTF-8; they also end at what is left out, and where one is very long.
  """
  left_out = LeftOut() if left_out is None else left_out
  rest = ''
  for text in _decoded(blocks):
    text, not_utf8 = _NOT_UTF8.subn('', text)
    left_out.not_utf8 += not_utf8
    left_out.reserved += sum(map(text.count, _RESERVED))
    *complete, rest = re.split(f'[\n{_RESERVED}]', rest + text)
    # However long the line is, only its last part is kept.
    whole = len(rest) // _LONGEST_LINE * _LONGEST_LINE
    yield from _parts([*complete, rest[:whole]])
    rest = rest[whole:]
  yield from _parts([rest])


def _decoded(blocks: Iterable[bytes]) -> Iterator[str]:
  decoder = codecs.getincrementaldecoder('utf-8')('surrogateescape')
  yield from map(decoder.decode, blocks)
  yield decoder.decode(b'', final=True)


def _parts(found: Iterable[str]) -> Iterator[bytes]:
  for line in found:
    for start in range(0, len(line), _LONGEST_LINE):
      yield line[start : start + _LONGEST_LINE].encode()
