"""Training of SentencePiece vocabularies from which every text can be restored exactly."""

import io
import os
import re
import time
from collections.abc import Iterable, Iterator

from absl import logging

from tvq_t5x.common.errors import ConfigError

# SentencePiece drops longer lines without a word.
_MAX_LINE = 16_384


def train(text: Iterable[bytes], vocab_size: int) -> bytes:
  """Trains a vocabulary of byte-pair encoding that keeps texts as they are.

  No character is changed or dropped: those that have no piece become bytes, and a line feed is a
  piece of its own. The one exception is U+2581, which SentencePiece itself writes for a space.

  Args:
    text: lines in UTF-8 without their ends, as `lines` gives them.
    vocab_size: pieces; padding is 0, EOS 1, unknown 2, and there is a piece for each byte.

  Returns:
    The model, as `SentencePieceProcessor` reads it.

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
      max_sentence_length=4 * _MAX_LINE,
      num_threads=os.cpu_count() or 1,
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
    return ConfigError('there is no text to train on')
  return error


def lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
  """The lines of a text that comes in blocks, without their ends and without empty ones.

  Args:
    blocks: of any size; their boundaries don't matter.

  Yields:
    lines in UTF-8, less what is no UTF-8; a very long one in parts.
  """
  rest = b''
  for block in blocks:
    *complete, rest = (rest + block).split(b'\n')
    # However long the line is, only its last part is kept.
    whole = len(rest) // _MAX_LINE * _MAX_LINE
    complete.append(rest[:whole])
    rest = rest[whole:]
    yield from _clean(complete)
  yield from _clean([rest])


def _clean(found: Iterable[bytes]) -> Iterator[bytes]:
  for line in found:
    for start in range(0, len(line), _MAX_LINE):
      # A part may begin or end within a character, which is then left out.
      part = line[start : start + _MAX_LINE].decode(errors='ignore').encode()
      if part:
        yield part
