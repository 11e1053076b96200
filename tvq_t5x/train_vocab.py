"""Trains a SentencePiece vocabulary from which every text can be restored exactly.

Examples:

  python -m tvq_t5x.train_vocab --task=kjv_bytes --vocab_size=2048 --output=kjv2048
  python -m tvq_t5x.train_vocab --input=a.txt --input='books/*.jsonl.zst' --output=mine
  python -m tvq_t5x.train_vocab --task=text --data_dir=books --output=mine
  python -m tvq_t5x.train_vocab --task=my_task --module=my_tasks --output=mine

It writes OUTPUT.model, which the setting SENTENCEPIECE_MODEL takes.
"""

import importlib
import itertools
import pkgutil
from collections.abc import Iterable, Iterator, Sequence

from absl import flags, logging

from tvq_t5x.commands import command_line
from tvq_t5x.common import files, quiet
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import locations, text_files, vocabulary_training
from tvq_t5x.gin_support import parsing

_EXAMPLE = 'python -m tvq_t5x.train_vocab --task=pg19 --data_dir=FOLDER --output=pg19'
_BLOCK = 1 << 20
_REPORT_EVERY = 100 * _BLOCK


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds the command's flags."""
  fv = flag_values
  flags.DEFINE_string('task', None, 'Task or mixture, whose training split is read.', fv)
  flags.DEFINE_string('module', None, 'Python module that registers the task.', fv)
  command_line.define_path_list_flag(
    'input',
    'File, folder or pattern of texts in UTF-8 (.txt, .gz, .zst, .jsonl, .parquet, .arrow); repeat '
    'it for more.',
    fv,
  )
  flags.DEFINE_string(
    'field', None, "Field of the records of --input that is their text; by default 'text'.", fv
  )
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
  module: str | None = None,
  field: str | None = None,
) -> int:
  """Trains a vocabulary and writes it.

  Args:
    task: name of a task or mixture, or
    inputs: paths of files or folders, or patterns of paths.
    output: path of the vocabulary, without '.model'.
    vocab_size: pieces.
    max_bytes: of text.
    data_dir: of the task, see `locations.data_dir`.
    module: that registers the task; None means one of this package.
    field: of the records of `inputs` that is their text; None means 'text'.

  Returns:
    Exit code: 0, or 2 for a wrong setting.
  """
  try:
    if (task is None) == (not inputs):
      raise ConfigError(f'give either --task or --input: try {_EXAMPLE}')
    if module and not task:
      raise ConfigError(f'--module={module} registers a task: give its name with --task.')
    if data_dir and not task:
      raise ConfigError(f'--data_dir={data_dir} is where a task has its data; leave it out.')
    if field and task:
      raise ConfigError(f'--field={field} is of the records of --input; leave it out.')
    if not output:
      raise ConfigError(f'--output has to be given: try {_EXAMPLE}')
    command_line.check_output('--output', f'{output}.model')
    with locations.data_dir(data_dir):
      blocks = _blocks_of_task(task, module) if task else _blocks_of_files(inputs, field)
      left_out = vocabulary_training.LeftOut()
      lines = vocabulary_training.lines(_capped(blocks, max_bytes), left_out)
      model = vocabulary_training.train(lines, vocab_size)
  except (ConfigError, ModuleNotFoundError) as e:
    return command_line.fail(parsing.message(e), 2)
  with files.replacing(f'{output}.model') as f:
    f.write(model)
  if str(left_out):
    logging.warning('No piece was learned from %s; they become bytes.', left_out)
  logging.info('Wrote %s.model, %s pieces.', output, f'{vocab_size:,}')
  return 0


def _capped(blocks: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
  """The first `max_bytes` bytes, with reports on the way."""
  size = 0
  for block in blocks:
    if size // _REPORT_EVERY != (size + len(block)) // _REPORT_EVERY:
      logging.info('Read %d MB of at most %d.', (size + len(block)) / 1e6, max_bytes / 1e6)
    if size + len(block) > max_bytes:
      yield _start(block, max_bytes - size)
      size = max_bytes
      break
    size += len(block)
    yield block
  logging.info('Read %.1f MB of text; training may take some minutes.', size / 1e6)


def _start(block: bytes, size: int) -> bytes:
  """At most `size` bytes, up to the end of a character."""
  while size and block[size] & 0xC0 == 0x80:  # It goes on with a character.
    size -= 1
  return block[:size]


def _blocks_of_files(inputs: Sequence[str], field: str | None) -> Iterator[bytes]:
  found = text_files.find(inputs, '--input')
  if field and not any(file.has_records for file in found.files):
    raise ConfigError(f'--field={field}: no file of --input has records; leave it out.')
  if found.others:
    logging.info(
      '--input: %d files of other kinds are not read, such as %s.',
      len(found.others), found.others[0],
    )  # fmt: skip
  field = field or 'text'
  return itertools.chain.from_iterable(_blocks_of_file(file, field) for file in found.files)


def _blocks_of_file(file: text_files.TextFile, field: str) -> Iterator[bytes]:
  if file.has_records:
    return _ended(text_files.records(file, field))
  return itertools.chain(text_files.blocks(file), [b'\n'])  # The next file starts a line.


def _blocks_of_task(name: str, module: str | None) -> Iterator[bytes]:
  """The texts of a task's training split, before they are tokenized."""
  with quiet.imports():
    import seqio

    from tvq_t5x import tasks  # pyright: ignore[reportAttributeAccessIssue]
    from tvq_t5x.data import documents, registered, text_task

    if module:
      registered.import_tasks(module, '--module')
    else:
      for ours in pkgutil.iter_modules(tasks.__path__):
        importlib.import_module(f'{tasks.__name__}.{ours.name}')
  known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
  if name not in known:
    raise ConfigError(
      f'--task={name}: there is no such task; there are {", ".join(known)}, or those of your own '
      'module, with --module.'
    )
  found = []
  for task in seqio.get_subtasks(seqio.get_mixture_or_task(name)):
    if isinstance(task, text_task.TextTask):
      found.append(task.blocks('train'))
      continue
    texts = documents.texts(task, 'train') if 'train' in task.splits else None
    if texts is None:
      raise ConfigError(f"--task={name}: {task.name} has no text in a split 'train'.")
    found.append(_ended(texts))
  locations.check_data_dir()
  return itertools.chain.from_iterable(found)


def _ended(texts: Iterable[bytes]) -> Iterator[bytes]:
  for text in texts:
    yield text
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
    values.module,
    values.field,
  )


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  command_line.start(_main)
