"""What the package's commands share: T5X's gin flags, and errors on one line."""

import contextlib
import errno
import logging as std_logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags, logging

from tvq_t5x.common import files, interrupts
from tvq_t5x.common.errors import CheckpointError, ConfigError

_HELP = frozenset(f'{dashes}{name}' for dashes in ('-', '--') for name in ('help', 'helpfull', 'h'))

# The exit code of a mistake on the command line: absl's is that of a run that failed.
_USAGE = 2

_UNWRITTEN = 'the output can not be written'

# Of an OSError: there is no room on the disk.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

# The flags that are defined here belong to the command: its --help shows them.
flags.disclaim_key_flags()


def define_gin_flags(flag_values: flags.FlagValues) -> None:
  """Adds T5X's flags that say where the configuration is."""
  define_path_list_flag(
    'gin_file', 'Gin file; repeat it for more, where a later one holds.', flag_values
  )
  flags.DEFINE_multi_string(
    'gin_bindings', [], 'A setting NAME=VALUE; --gin.NAME=VALUE is the same.', flag_values
  )
  flags.DEFINE_list(
    'gin_search_paths', [], 'More folders to look for gin files in, with commas.', flag_values
  )


def define_checkpoint_flag(flag_values: flags.FlagValues) -> None:
  """Adds --checkpoint."""
  flags.DEFINE_string(
    'checkpoint',
    None,
    'MODEL_DIR, whose newest checkpoint that can be read is taken, or one of its checkpoint_N '
    'folders. Without --gin_file, the config.gin in MODEL_DIR says what was trained.',
    flag_values,
  )
  flags.DEFINE_multi_string(
    'module',
    [],
    'Module of yours that the config.gin in MODEL_DIR may import; repeat it for more. Without it, '
    "that file may name only what is this package's own.",
    flag_values,
  )


def define_data_flag(flag_values: flags.FlagValues) -> None:
  """Adds --data_dir, which `locations.data_dir` takes."""
  define_path_flag(
    'data_dir',
    None,
    "Folder of the task's data, or its file, where no setting of its own says where it lies.",
    flag_values,
  )


def define_path_flag(
  name: str, default: str | None, text: str, flag_values: flags.FlagValues
) -> None:
  """Adds a flag for a path, in which `~` is filled in: the shell leaves it in --FLAG=~/FILE."""
  flags.DEFINE(_Path(), name, default, text, flag_values, flags.ArgumentSerializer())


def define_path_list_flag(name: str, text: str, flag_values: flags.FlagValues) -> None:
  """`define_path_flag` for one that may be repeated, by default []."""
  flags.DEFINE_multi(_Path(), flags.ArgumentSerializer(), name, [], text, flag_values)


class _Path(flags.ArgumentParser[str]):
  def parse(self, argument: str) -> str:
    return os.path.expanduser(argument)

  def flag_type(self) -> str:
    return 'string'


def start(main: Callable[[Sequence[str]], int]) -> None:
  """Runs the main function of a command as `app.run` does, and ends with its exit code.

  Output that can't be written, characters that it has no code for, and Ctrl-C, at any time, end
  with a line and no traceback.
  """
  _open_streams()
  files.do_without_temporary_folder()
  code = 1
  try:
    interrupts.raise_again()
    app.run(main, flags_parser=parse_flags)
  except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # It is being done.
    code = fail('interrupted', 128 + signal.SIGINT)
  except BrokenPipeError:
    code = 0  # Who reads the output has seen enough, as `head` does.
  except OSError as e:
    # Without a number it is a library's own, which says what to do, as of a folder for caches.
    if e.errno is not None and e.errno not in (*NO_ROOM, errno.EBADF):
      raise
    code = fail(str(e) if e.errno is None or e.filename else f'{_UNWRITTEN}: {e}', 1)
  except SystemExit as e:
    code = _code_of(e)
  finally:
    unwritten = _flush_output()
    code = code or unwritten
    interrupts.end_at_once()  # Libraries take a moment to end, too.
  sys.exit(code)


def _code_of(end: SystemExit) -> int:
  if end.code is None or isinstance(end.code, int):
    return end.code or 0
  print(end.code, file=sys.stderr)
  return 1


def _open_streams() -> None:
  """Gives a process all three streams: else the next file that it opens would be one of them."""
  # Who closed the output loses none of it in silence: the first write fails.
  for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, mode)  # Takes the lowest number that is free.
  for number, name in ((1, 'stdout'), (2, 'stderr')):
    if getattr(sys, name) is None:
      setattr(sys, name, open(number, 'w', encoding='utf-8', closefd=False))  # noqa: SIM115
    # Rather a code than no text at all, where the terminal lacks a character.
    getattr(sys, name).reconfigure(errors='backslashreplace')
  logging.get_absl_handler().python_handler.stream = sys.stderr


def _flush_output() -> int:
  """Writes what is left; the exit code for output that can't be written, or 0."""
  try:
    sys.stdout.flush()
    return 0
  except OSError as e:
    # Python would try again at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if isinstance(e, BrokenPipeError) else fail(f'{_UNWRITTEN}: {e}', 1)


def parse_flags(args: Sequence[str]) -> list[str]:
  """`app.run`'s `flags_parser`, for which --gin.NAME=VALUE is a flag."""
  from tvq_t5x.gin_support import parsing

  try:
    args = parsing.rewrite_gin_args(args)
  except ConfigError as e:
    sys.exit(fail(str(e), _USAGE))
  try:
    rest = app.parse_flags_with_usage(list(args))
  except SystemExit:
    if _HELP.intersection(args):
      sys.exit(0)  # absl's exit code is that of a mistake.
    sys.exit(_USAGE)
  for name in flags.FLAGS:
    flag = flags.FLAGS[name]
    if flag.present > 1 and not isinstance(flag, flags.MultiFlag):
      sys.exit(fail(f'--{name} was given {flag.present} times: give it once', _USAGE))
  return rest


def prepare(args: Sequence[str]) -> None:
  """Refuses arguments that are no flags, and shows the time and our own messages in the log.

  Args:
    args: what `app.run` gives to the main function.
  """
  if len(args) > 1:
    raise app.UsageError(f'Not a flag: {args[1]}', exitcode=_USAGE)
  _show_log(logging.get_absl_handler())


def log_if_nobody_does() -> None:
  """Shows the log of a command that is called from Python, where nothing says what to do with it.

  Without it, training from a notebook would not say a word. A notebook shows stderr as what is
  wrong, and so gets it as output.
  """
  if logging.get_verbosity() == logging.WARNING and not std_logging.getLogger().handlers:
    logging.set_verbosity(logging.INFO)
    # absl's own handler would complain that no flags were parsed.
    handler = std_logging.StreamHandler(sys.stdout if 'ipykernel' in sys.modules else None)
    std_logging.getLogger().addHandler(handler)
    _show_log(handler)


def _show_log(handler: std_logging.Handler) -> None:
  handler.setFormatter(std_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  if logging.get_verbosity() <= logging.INFO:
    # Orbax has several lines to say of each step of a save, and JAX of devices that are not there.
    ours = os.path.dirname(os.path.dirname(__file__))
    handler.addFilter(lambda r: r.levelno > std_logging.INFO or r.pathname.startswith(ours))
    # Orbax logs what its threads raise, and raises it again where the save is waited for.
    handler.addFilter(lambda r: not (r.exc_info and f'{os.sep}orbax{os.sep}' in r.pathname))


def check_output(flag: str, path: str | None) -> None:
  """Refuses a path that can't be written; None and '-' can.

  Args:
    flag: its name, for the message.
    path: of a file that need not exist.

  Raises:
    ConfigError: with the reason.
  """
  if path in (None, '-'):
    return
  full = os.path.abspath(path)
  folder = os.path.dirname(full)
  if not path or os.path.isdir(full):
    raise ConfigError(f'{flag}={path}: give the path of a file.')
  if not os.path.isdir(folder):
    raise ConfigError(f'{flag}={path}: there is no folder {folder}.')
  if not os.access(full if os.path.exists(full) else folder, os.W_OK):
    raise ConfigError(f'{flag}={path} can not be written.')


def exit_code(command: Callable[[], None], gin_bindings: Sequence[str] = ()) -> int:
  """Runs a command that reads a checkpoint, and says what went wrong on a line.

  Args:
    command: to run.
    gin_bindings: settings of which it tells afterwards if they changed nothing.

  Returns:
    0, 1 for a checkpoint that can't be read, 2 for a wrong setting, 130 after Ctrl-C.
  """
  from tvq_t5x.common import jax_modes
  from tvq_t5x.gin_support import parsing, unread

  try:
    with jax_modes.usual():
      command()
    sys.stdout.flush()
    for binding in unread.unread(gin_bindings):
      logging.warning('--gin.%s changed nothing: leave it out.', binding.replace(' = ', '=', 1))
  except ConfigError as e:
    return fail(parsing.message(e), 2)
  except CheckpointError as e:
    return fail(parsing.message(e), 1)
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:
    # Who reads the output has seen enough, as `head` does; Python would complain at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 0


def table(values: Mapping[str, int | float]) -> str:
  """A line for each number: its name and the number."""
  cells = {
    name: f'{value:,}' if isinstance(value, int) else f'{value:.{1 if name == "seconds" else 4}f}'
    for name, value in values.items()
  }
  width, value_width = (max(map(len, texts)) for texts in (cells, cells.values()))
  return '\n'.join(f'{name:{width}}  {text:>{value_width}}' for name, text in cells.items())


def fail(message: str, code: int) -> int:
  """Prints an error; returns the exit code."""
  with contextlib.suppress(OSError):  # Nobody may be there to read.
    logging.flush()
    print('error: ' + message.replace('\n', '\n  '), file=sys.stderr, flush=True)
  return code
