"""Tables in text files, a row a line and fields between tabs, of which single rows are read."""

import functools
import mmap
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from tvq_t5x.common.errors import ConfigError

_TAB, _LINE_FEED = b'\t\n'
_BLOCK = 1 << 26


class Columns(NamedTuple):
  """What a table has to hold.

  Attributes:
    names: of its fields.
    header: whether they are its first line.
    label: place of the field with the class.
    num_classes: classes are below it.
  """

  names: Sequence[str]
  header: bool
  label: int
  num_classes: int


class Table:
  """The rows of a file, which stays on the disk; lines may end with LF or CRLF."""

  def __init__(self, path: str, columns: Columns):
    """Looks through the whole file once.

    Args:
      path: of the file.
      columns: that it has to have.

    Raises:
      ConfigError: if it can't be read, or has another header, number of fields or class; the
        message names the line.
    """
    self._path, self._columns = path, columns
    try:
      with open(path, 'rb') as f:
        size = os.fstat(f.fileno()).st_size
        self._data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b''
    except OSError as e:
      raise ConfigError(f'{path!r} can not be read: {e}.') from e
    self._first = int(columns.header)
    ends = _places(self._data, _LINE_FEED)
    if size and (not len(ends) or ends[-1] != size - 1):
      ends = np.append(ends, size)  # The last line is not ended.
    self._ends = ends
    self._check()

  def __len__(self) -> int:
    return len(self._ends) - self._first

  def row(self, index: int) -> list[bytes]:
    """The fields of a row."""
    return self._line(index + self._first).split(b'\t')

  def label(self, index: int) -> int:
    """The class of a row, perhaps written as 1.0."""
    field = self.row(index)[self._columns.label]
    try:
      value = float(field)
    except ValueError:
      value = -1.0
    if value not in range(self._columns.num_classes):
      raise ConfigError(
        f'{self._path!r}, line {index + self._first + 1}: {field.decode(errors="replace")!r} is no '
        f'class; there are 0 to {self._columns.num_classes - 1}.'
      )
    return int(value)

  def _line(self, number: int) -> bytes:
    start = int(self._ends[number - 1]) + 1 if number else 0
    return self._data[start : int(self._ends[number])].removesuffix(b'\r')

  def _check(self) -> None:
    names = self._columns.names
    if self._columns.header and (
      not len(self._ends) or self._line(0).split(b'\t') != [name.encode() for name in names]
    ):
      found = self._line(0)[:80].decode(errors='replace') if len(self._ends) else 'nothing'
      raise ConfigError(
        f'{self._path!r} has to begin with the line {chr(9).join(names)!r}, and begins with '
        f'{found!r}.'
      )
    # Fields of all lines at once.
    tabs = np.searchsorted(_places(self._data, _TAB), self._ends)
    fields = np.diff(tabs, prepend=0) + 1
    (wrong,) = np.nonzero(fields != len(names))
    if len(wrong):
      line = int(wrong[0])
      raise ConfigError(
        f'{self._path!r}, line {line + 1}: {fields[line]} fields between tabs; there have to be '
        f'{len(names)}: {", ".join(names)}.'
      )
    for index in range(len(self)):
      self.label(index)


def _places(data: mmap.mmap | bytes, value: int) -> np.ndarray:
  """Where a byte occurs, [n] int64."""
  found = [
    i + np.flatnonzero(np.frombuffer(data[i : i + _BLOCK], np.uint8) == value)
    for i in range(0, len(data), _BLOCK)
  ]
  return np.concatenate(found or [np.zeros(0, np.int64)])


def read(path: str, columns: Columns) -> Table:
  """The table in a file, looked through anew only when the file is another one.

  Args:
    path: of the file.
    columns: that it has to have.

  Raises:
    ConfigError: see `Table`.
  """
  try:
    status = os.stat(path)
  except OSError as e:
    raise ConfigError(f'{path!r} can not be read: {e.strerror}.') from e
  return _read(path, columns, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read(path: str, columns: Columns, size: int, mtime_ns: int) -> Table:
  del size, mtime_ns
  return Table(path, columns)


def find(folder: str, names: Sequence[str], get_it: Callable[[], str]) -> str:
  """The first of some files that is in a folder.

  Args:
    folder: of the user.
    names: paths within it, by preference.
    get_it: says where to get them, for the message.

  Raises:
    ConfigError: if there is none.
  """
  for name in names:
    if os.path.exists(path := os.path.join(folder, name)):
      return path
  raise ConfigError(f'there is no {" and no ".join(names)} in {folder!r}: {get_it()}.')
