"""Where data and other files lie: said in gin, by an environment variable or by --data_dir."""

import contextlib
import os
from collections.abc import Callable, Iterator

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import configurables

# The folder of the tokens of data, by default beside it.
TOKEN_CACHE = 'token_cache'
# What --data_dir sets, so that processes that are started see it too, and T5X can be told.
_DATA_DIR = 'TVQ_DATA_DIR'
# The folder of --data_dir, until something is looked for in it.
_unread: list[str] = []


def path(name: str, value: str | None) -> str | None:
  """A path that a gin macro sets, or else the environment variable with the macro's name.

  Args:
    name: of both.
    value: from gin; None or '' means that gin does not set it.

  Returns:
    The path with `~` filled in, or None if it is set in neither way.
  """
  found = value or os.environ.get(name)
  return os.path.expanduser(found) if found else None


def data_path(name: str, value: str | None) -> str | None:
  """The path of a task's data: from gin, or the environment variable, or the folder of --data_dir.

  Args:
    name: of the gin macro and of the environment variable.
    value: from gin; None or '' means that gin does not set it.

  Returns:
    The path with `~` filled in, or None if it is set in none of these ways.
  """
  found = path(name, value)
  if found is None:
    _unread.clear()
    found = path(_DATA_DIR, None)
  return found


def needed_data_path(name: str, value: str | None, get_it: Callable[[], str]) -> str:
  """`data_path` of data that a task can't do without.

  Args:
    name: as there.
    value: as there.
    get_it: says what to do about it.

  Raises:
    ConfigError: if it is not set.
  """
  found = data_path(name, value)
  if found is None:
    raise ConfigError(f'{name} is not set: {get_it()}.')
  return found


@contextlib.contextmanager
def data_dir(folder: str | None) -> Iterator[None]:
  """Makes a folder, or a file, that of --data_dir until the context ends; None changes nothing.

  `check_data_dir` is to be called once the data has been looked for.

  Raises:
    ConfigError: if there is none.
  """
  before = os.environ.get(_DATA_DIR)
  _unread.clear()
  try:
    if folder is not None:
      _unread.append(folder)
      os.environ[_DATA_DIR] = _found(folder)
    yield
  finally:
    _unread.clear()
    os.environ.pop(_DATA_DIR, None)
    if before is not None:
      os.environ[_DATA_DIR] = before


def _found(folder: str) -> str:
  if '://' in folder:  # TFDS reads from Cloud Storage, too.
    return folder
  if not os.path.exists(folder):
    raise ConfigError(f'--data_dir={folder}: there is no such folder or file.')
  return os.path.abspath(folder)


def check_data_dir() -> None:
  """Refuses a --data_dir in which nothing was looked for.

  Raises:
    ConfigError: if there was one.
  """
  for folder in _unread:
    raise ConfigError(
      f'--data_dir={folder}: the data does not come from there, as the task reads no folder, or a '
      'setting of its own or an environment variable says where it lies; leave it out.'
    )


def how_to_set(name: str) -> str:
  """The ways to set `name`, for messages: gin's only where the gin files have the macro."""
  return ' or '.join(_ways(name))


def how_to_set_data(name: str) -> str:
  """The ways to say where a task's data lies, --data_dir among them, for messages."""
  return f'{", ".join(_ways(name))} or --data_dir=FOLDER (in T5X, {_DATA_DIR})'


def _ways(name: str) -> list[str]:
  variable = f'the environment variable {name}'
  return [f'--gin.{name}=\\"...\\"', variable] if configurables.has_macro(name) else [variable]
