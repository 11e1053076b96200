"""Files that are complete or not there, and lines of JSON."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO


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
