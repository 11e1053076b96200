"""`enwik8`: the first 100,000,000 bytes of the English Wikipedia of 2006, byte by byte.

The file is the user's: http://mattmahoney.net/dc/enwik8.zip, 36 MB, or what is in it. The first
90,000,000 bytes train, the next 5,000,000 validate, the last 5,000,000 test; each split is one
document.
"""

import functools
import hashlib
import mmap
import os
import zipfile

import gin
import numpy as np

from tvq_t5x import indexed, settings
from tvq_t5x.errors import ConfigError

_MACRO = 'ENWIK8_PATH'
_URL = 'http://mattmahoney.net/dc/enwik8.zip'
_SIZE = 100_000_000
_SHA1 = '57b8363b814821dc9d47aa4d41f58733519076b2'
_SPLITS = {
  'train': (0, 90_000_000),
  'validation': (90_000_000, 95_000_000),
  'test': (95_000_000, _SIZE),
}


@gin.configurable
def corpus(path: str | None = None, sha1: str = _SHA1) -> np.ndarray:
  """The whole corpus, [100,000,000] uint8.

  Args:
    path: of the file, which is memory-mapped, or of the zip that holds it, which is read; macro
      ENWIK8_PATH. None means the environment variable ENWIK8_PATH.
    sha1: of the file, in hexadecimal.

  Raises:
    ConfigError: if there is no such file, or it is another one.
  """
  found = settings.path(_MACRO, path)
  if found is None:
    raise ConfigError(
      f'{_MACRO} is not set: get {_URL} and give its path with {settings.how_to_set(_MACRO)}.'
    )
  try:
    status = os.stat(found)
    return _read(found, sha1, status.st_size, status.st_mtime_ns)
  except (OSError, zipfile.BadZipFile) as e:
    raise ConfigError(
      f'{_MACRO} = {found!r} can not be read ({e}): give the path of enwik8 or of enwik8.zip, from '
      f'{_URL}.'
    ) from e


@functools.lru_cache(maxsize=1)
def _read(path: str, sha1: str, size: int, mtime_ns: int) -> np.ndarray:
  del size, mtime_ns  # Another file at the same path is another entry of the cache.
  if zipfile.is_zipfile(path):
    with zipfile.ZipFile(path) as archive:
      members = archive.infolist()
      # Only what has the right size: nothing is unpacked to find out that it is too much.
      data = archive.read(members[0]) if [m.file_size for m in members] == [_SIZE] else b''
  else:
    with open(path, 'rb') as f:
      is_right = os.fstat(f.fileno()).st_size == _SIZE
      data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if is_right else b''
  found = hashlib.sha1(data).hexdigest() if len(data) == _SIZE else f'not {_SIZE:,} bytes'
  if found != sha1:
    raise ConfigError(
      f'{_MACRO} = {path!r} is not enwik8: it has SHA-1 {sha1} and {_SIZE:,} bytes, this is '
      f'{found}. Get {_URL}.'
    )
  return np.frombuffer(data, np.uint8)


def documents(split: str) -> list[np.ndarray]:
  """Returns the one document of a split, a view of the corpus."""
  start, end = _SPLITS[split]
  return [corpus()[start:end]]


indexed.byte_level_task('enwik8', documents, splits=tuple(_SPLITS))
