"""Paths as Orbax takes them."""

import os

from tvq_t5x.common import files


def absolute(path: str) -> str:
  """The absolute path of a folder; one in a bucket, as 'gs://bucket/folder', stays as it is.

  Raises:
    ConfigError: if T5X would not find its checkpoints there, as it takes the name for a pattern.
  """
  full = path if '://' in path else os.path.abspath(path)
  files.check_name(full, f'{path!r}')
  return full
