"""Generates ListOps, the first task of the Long Range Arena, in the files that are published.

Examples:

  python -m tvq_t5x.make_listops --output_dir=listops
  python -m tvq_t5x.make_listops --output_dir=small --min_length=20 --max_length=100

It writes basic_train.tsv, basic_val.tsv and basic_test.tsv, which the task lra_listops reads from
--data_dir. The same seed gives the same bytes, with any number of processes.
"""

import contextlib
import os
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from absl import flags, logging

from tvq_t5x.commands import command_line
from tvq_t5x.common import files
from tvq_t5x.common.errors import ConfigError, reason
from tvq_t5x.data import listops

_HEADER = b'Source\tTarget\r\n'
_REPORT_EVERY = 10_000


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds the command's flags; the defaults are the published sizes."""
  fv, usual = flag_values, listops.Settings()

  def whole(name: str, default: int, text: str, low: int | None, high: int | None = None) -> None:
    flags.DEFINE_integer(name, default, text, low, high, fv)

  command_line.define_path_flag('output_dir', None, 'Folder to write to; it may not exist yet.', fv)
  whole('num_train', 96_000, 'Examples of the training split.', 0)
  whole('num_validation', 2_000, 'Examples of the validation split.', 0)
  whole('num_test', 2_000, 'Examples of the test split.', 0)
  text = 'Symbols of an expression at {}, without parentheses.'
  whole('min_length', usual.min_length, text.format('least'), 1)
  whole('max_length', usual.max_length, text.format('most'), 1, 100_000)
  whole('max_depth', usual.max_depth, 'Depth of an expression at most; a digit has 1.', 1, 100)
  whole('max_args', usual.max_args, 'Arguments of an operator at most.', 2, 100)
  whole('seed', usual.seed, 'What all follows from.', None)
  whole('num_processes', os.cpu_count() or 1, 'Processes that draw expressions.', 1)


def run(
  output_dir: str | None,
  sizes: Mapping[str, int],
  settings: listops.Settings,
  num_processes: int = 1,
) -> int:
  """Generates the files.

  Args:
    output_dir: folder to write to.
    sizes: examples of 'train', 'val' and 'test', as the files call them.
    settings: of the expressions.
    num_processes: that draw them.

  Returns:
    Exit code: 0, or 2 for a wrong setting.
  """
  try:
    folder = _folder(output_dir, sizes)
    if settings.min_length > settings.max_length:
      raise ConfigError(
        f'--min_length={settings.min_length} is more than --max_length={settings.max_length}.'
      )
    total = sum(sizes.values())
    if not total:
      raise ConfigError('--num_train, --num_validation, --num_test: give one that is not 0.')
    listops.check(settings, total)
    made = not folder.exists()
    try:
      folder.mkdir(exist_ok=True)
    except OSError as e:
      raise ConfigError(f'--output_dir={output_dir} can not be written: {reason(e)}') from e
  except ConfigError as e:
    return command_line.fail(str(e), 2)
  try:
    _write(folder, sizes, settings, num_processes)
  except BaseException:
    if made:
      with contextlib.suppress(OSError):  # Something else is in it.
        folder.rmdir()
    raise
  logging.info('Wrote %s examples to %s.', f'{total:,}', folder)
  return 0


def _folder(output_dir: str | None, sizes: Mapping[str, int]) -> pathlib.Path:
  if not output_dir:
    raise ConfigError('--output_dir has to be given, such as --output_dir=listops.')
  folder = files.absolute(output_dir, f'--output_dir={output_dir}')
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f'--output_dir={output_dir} is a file: give a folder.')
  if there := [name for name in map(_name, sizes) if (folder / name).exists()]:
    raise ConfigError(
      f'--output_dir={output_dir} has {there[0]} already: give another folder, or remove it.'
    )
  parent = folder if folder.exists() else folder.parent
  if not parent.is_dir():
    raise ConfigError(f'--output_dir={output_dir}: there is no folder {parent}.')
  if not os.access(parent, os.W_OK):
    raise ConfigError(f'--output_dir={output_dir} can not be written.')
  return folder


def _name(split: str) -> str:
  return f'basic_{split}.tsv'


def _write(
  folder: pathlib.Path, sizes: Mapping[str, int], settings: listops.Settings, num_processes: int
) -> None:
  """Writes all files; none is there before all are complete."""
  done = 0
  with contextlib.ExitStack() as stack:
    expressions = stack.enter_context(
      contextlib.closing(listops.expressions(settings, num_processes))
    )
    for split, size in sizes.items():
      file = stack.enter_context(files.replacing(folder / _name(split)))
      file.write(_HEADER)
      for _ in range(size):
        expression = next(expressions)
        file.write(f'{expression.text}\t{expression.value}\r\n'.encode())
        done += 1
        if done % _REPORT_EVERY == 0:
          logging.info('%s of %s examples.', f'{done:,}', f'{sum(sizes.values()):,}')


def _end(number: int, frame: FrameType | None) -> None:
  """Ends the process as after Ctrl-C: what is not complete is removed."""
  del frame
  sys.exit(128 + number)


def _main(args: Sequence[str]) -> int:
  command_line.prepare(args)
  signal.signal(signal.SIGTERM, _end)
  values = flags.FLAGS
  sizes = {'train': values.num_train, 'val': values.num_validation, 'test': values.num_test}
  settings = listops.Settings(
    values.min_length, values.max_length, values.max_depth, values.max_args, values.seed
  )
  return run(values.output_dir, sizes, settings, values.num_processes)


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  command_line.start(_main)
