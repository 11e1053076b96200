"""Paths that users give, files that are complete or not there, and lines of JSON."""

import contextlib
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from tvq_t5x.common.errors import ConfigError

# Orbax looks for what it has written by patterns, and TensorStore takes no backslash.
_NOT_IN_CHECKPOINTS = frozenset('*?[\\')


def absolute(path: str, given: str) -> pathlib.Path:
  """The absolute path of what a user gives, with `~` filled in.

  Args:
    path: not empty.
    given: the flag or setting with this value, for the message.

  Raises:
    ConfigError: if it begins with the home folder of nobody.
  """
  full = os.path.expanduser(path)
  if full.startswith('~'):
    raise ConfigError(
      f'{given}: there is no home folder for {path.split("/")[0]}; give an absolute path, or '
      f'./{path} for a folder of that name.'
    )
  return pathlib.Path(full).absolute()


def check_name(path: str | os.PathLike[str], given: str) -> None:
  """Refuses the path of a folder in which checkpoints could be written, and not be read.

  Args:
    path: absolute, as links in it are not followed.
    given: the setting with its value, for the message.

  Raises:
    ConfigError: with the characters that do it.
  """
  text = os.fspath(path)
  if bad := sorted({c for c in text if c in _NOT_IN_CHECKPOINTS or _is_no_text(c)}):
    raise ConfigError(
      f'{given}: checkpoints in {text!r} could not be read again because of '
      f'{" ".join(map(repr, bad))}; give a path without * ? [ and backslashes, in UTF-8 and '
      'without control characters.'
    )


def _is_no_text(character: str) -> bool:
  """Whether a character is a control character, or stands for a byte that is no UTF-8."""
  return character < ' ' or character == '\x7f' or '\ud800' <= character <= '\udfff'


def do_without_temporary_folder() -> None:
  """To be called before TensorFlow is imported, which asks where the folder is, and needs none."""
  try:
    tempfile.gettempdir()
  except FileNotFoundError:
    tempfile.tempdir = os.curdir


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
  """A file that takes the place of `path` once it is complete and on the disk."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'{path.name}.incomplete')
  try:
    with temporary.open('wb') as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def json_line(record: Mapping[str, Any]) -> str:
  """A record as a line of JSON, which has null for what is no finite number."""
  finite = {
    k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
  }
  return json.dumps(finite) + '\n'
