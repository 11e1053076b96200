"""Arguments of the Python API that are no path or list of texts are refused."""

import os
from collections.abc import Sequence
from typing import Any

from tvq_t5x.common.errors import ConfigError


def path(name: str, value: Any) -> str:
  """A path as text.

  Args:
    name: of the argument.
    value: that was given for it.

  Raises:
    ConfigError: for anything else.
  """
  if not isinstance(value, str | os.PathLike):
    raise ConfigError(name, value, 'a path')
  return os.fspath(value)


def paths(name: str, value: Any) -> list[str]:
  """A path, or a list of them, as a list; see `path`."""
  return [path(name, x) for x in (value if isinstance(value, list | tuple) else [value])]


def texts(name: str, values: Sequence[str]) -> list[str]:
  """A list of texts, see `path`: of one text each letter would be one."""
  if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
    raise ConfigError(name, values, 'a list of texts')
  return list(values)
