"""Files that are complete or not there."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO


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
