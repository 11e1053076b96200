"""Trains a SentencePiece vocabulary from which every text can be restored exactly.

Examples:

  python -m tvq_t5x.train_vocab --task=kjv_bytes --vocab_size=2048 --output=kjv2048
  python -m tvq_t5x.train_vocab --input=a.txt --input=b.txt --output=mine

It writes OUTPUT.model, which the setting SENTENCEPIECE_MODEL takes.
"""

import importlib
import os
import pkgutil
from collections.abc import Iterable, Iterator, Sequence

from absl import app, flags, logging

from tvq_t5x.commands import command_line
from tvq_t5x.common import files
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import locations, vocabulary_training
from tvq_t5x.gin_support import parsing

_EXAMPLE = 'python -m tvq_t5x.train_vocab --task=pg19 --data_dir=FOLDER --output=pg19'
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
    data_dir: of the task, see `locations.set_data_dir`.

  Returns:
    Exit code: 0, or 2 for a wrong setting.
  """
  try:
    if (task is None) == (not inputs):
      raise ConfigError(f'give either --task or --input: try {_EXAMPLE}')
    if not output:
      raise ConfigError(f'--output has to be given: try {_EXAMPLE}')
    command_line.check_output('--output', f'{output}.model')
    locations.set_data_dir(data_dir)
    blocks = _blocks_of_task(task) if task else _blocks_of_files(inputs)
    model = vocabulary_training.train(
      vocabulary_training.lines(_capped(blocks, max_bytes)), vocab_size
    )
  except (ConfigError, ModuleNotFoundError) as e:
    return command_line.fail(parsing.message(e), 2)
  with files.replacing(f'{output}.model') as f:
    f.write(model)
  logging.info('Wrote %s.model, %s pieces.', output, f'{vocab_size:,}')
  return 0


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
  with command_line.quiet_imports():
    import seqio
    import tensorflow as tf

    from tvq_t5x import tasks  # pyright: ignore[reportAttributeAccessIssue]
    from tvq_t5x.data import indexed

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
  app.run(_main, flags_parser=command_line.parse_flags)
