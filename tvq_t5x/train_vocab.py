"""Trains a SentencePiece vocabulary from which every text can be restored exactly.

Examples:

  python -m tvq_t5x.train_vocab --task=kjv_bytes --vocab_size=2048 --output=kjv2048
  python -m tvq_t5x.train_vocab --input=a.txt --input=b.txt --output=mine

It writes OUTPUT.model, which the setting SENTENCEPIECE_MODEL takes.
"""

import importlib
import io
import os
import pkgutil
import re
import time
from collections.abc import Iterable, Iterator, Sequence

from absl import app, flags, logging

from tvq_t5x import command_line, files, gin_utils, settings
from tvq_t5x.errors import ConfigError

_EXAMPLE = 'python -m tvq_t5x.train_vocab --task=pg19 --data_dir=FOLDER --output=pg19'
# SentencePiece drops longer lines without a word.
_MAX_LINE = 16_384
_BLOCK = 1 << 20
_REPORT_EVERY = 100 * _BLOCK


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds the command's flags."""
  fv = flag_values
  flags.DEFINE_string('task', None, 'Task of this package: its training split is read.', fv)
  command_line.define_path_list_flag('input', 'Text file in UTF-8; repeat it for more.', fv)
  command_line.define_path_flag('output', None, 'Where to write: this path and .model.', fv)
  command_line.define_data_flag(fv)
  flags.DEFINE_integer(
    'vocab_size',
    32_000,
    'Pieces; padding, EOS, unknown, line feed and 256 bytes are among them.',
    lower_bound=1,
    flag_values=fv,
  )
  flags.DEFINE_integer(
    'max_bytes',
    300_000_000,
    'Text that is read at most, from the beginning.',
    lower_bound=1,
    flag_values=fv,
  )


def run(
  task: str | None,
  inputs: Sequence[str],
  output: str | None,
  vocab_size: int,
  max_bytes: int,
  data_dir: str | None = None,
) -> int:
  """Trains a vocabulary and writes it.

  Args:
    task: name of a task, or
    inputs: paths of text files.
    output: path of the vocabulary, without '.model'.
    vocab_size: pieces.
    max_bytes: of text.
    data_dir: of the task, see `settings.set_data_dir`.

  Returns:
    Exit code: 0, or 2 for a wrong setting.
  """
  try:
    if (task is None) == (not inputs):
      raise ConfigError(f'give either --task or --input: try {_EXAMPLE}')
    if not output:
      raise ConfigError(f'--output has to be given: try {_EXAMPLE}')
    command_line.check_output('--output', f'{output}.model')
    settings.set_data_dir(data_dir)
    blocks = _blocks_of_task(task) if task else _blocks_of_files(inputs)
    model = train(lines(_capped(blocks, max_bytes)), vocab_size)
  except (ConfigError, ModuleNotFoundError) as e:
    return command_line.fail(gin_utils.message(e), 2)
  with files.replacing(f'{output}.model') as f:
    f.write(model)
  logging.info('Wrote %s.model, %s pieces.', output, f'{vocab_size:,}')
  return 0


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


def _capped(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
  """The first `max_bytes` bytes, with reports on the way."""
  size = 0
  for block in blocks:
    block = block[: max_bytes - size]
    if size // _REPORT_EVERY != (size + len(block)) // _REPORT_EVERY:
      logging.info('Read %d MB of at most %d.', (size + len(block)) / 1e6, max_bytes / 1e6)
    size += len(block)
    yield block
    if size == max_bytes:
      break
  logging.info('Read %.1f MB of text; training may take some minutes.', size / 1e6)


def _blocks_of_files(paths: Sequence[str]) -> Iterator[bytes]:
  for path in paths:
    if not os.path.isfile(path):
      raise ConfigError(f'--input={path}: there is no such file.')
  return _read_files(paths)


def _read_files(paths: Sequence[str]) -> Iterator[bytes]:
  for path in paths:
    with open(path, 'rb') as f:
      while block := f.read(_BLOCK):
        yield block
    yield b'\n'  # The next file starts a line.


def _blocks_of_task(name: str) -> Iterator[bytes]:
  """The texts of a task's training split, before they are tokenized."""
  with command_line.quiet():
    import seqio
    import tensorflow as tf

    from tvq_t5x import indexed, tasks

    for module in pkgutil.iter_modules(tasks.__path__):
      importlib.import_module(f'{tasks.__name__}.{module.name}')
  known = ', '.join(sorted(seqio.TaskRegistry.names()))
  if name not in seqio.TaskRegistry.names():
    raise ConfigError(f'--task={name}: there is no such task; there are {known}.')
  texts = seqio.TaskRegistry.get(name).source.get_dataset('train', shuffle=False)
  if texts.element_spec['targets'].dtype != tf.string:
    raise ConfigError(f'--task={name} has no text.')
  return _read_texts(indexed.examples(texts))


def _read_texts(examples: Iterable[dict[str, bytes]]) -> Iterator[bytes]:
  for example in examples:
    yield example['targets']
    yield b'\n'


def _main(args: Sequence[str]) -> int:
  command_line.prepare(args)
  values = flags.FLAGS
  return run(
    values.task,
    values.input,
    values.output,
    values.vocab_size,
    values.max_bytes,
    values.data_dir,
  )


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  app.run(_main)
