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

import numpy as np

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import indexed, locations
from tvq_t5x.gin_support.configurables import configurable

_MACRO = 'ENWIK8_PATH'
_URL = 'http://mattmahoney.net/dc/enwik8.zip'
_NAMES = ('enwik8', 'enwik8.zip')
_SIZE = 100_000_000
_SHA1 = '57b8363b814821dc9d47aa4d41f58733519076b2'
_SPLITS = {
  'train': (0, 90_000_000),
  'validation': (90_000_000, 95_000_000),
  'test': (95_000_000, _SIZE),
}


@configurable
def corpus(path: str | None = None, sha1: str = _SHA1) -> np.ndarray:
  """The whole corpus, [100,000,000] uint8.

  Args:
    path: of the file, which is memory-mapped, of the zip that holds it, which is read, or of a
      folder with `enwik8` or `enwik8.zip`; macro ENWIK8_PATH. None means the environment variable
      ENWIK8_PATH, or else the folder of --data_dir.
    sha1: of the file, in hexadecimal.

  Raises:
    ConfigError: if there is no such file, or it is another one.
  """
  found = locations.data_path(_MACRO, path)
  if found is None:
    raise ConfigError(f'{_MACRO} is not set: {_get_it()}.')
  if os.path.isdir(found):
    found = _file_in(found)
  try:
    status = os.stat(found)
    return _read(found, sha1, status.st_size, status.st_mtime_ns)
  except (OSError, zipfile.BadZipFile) as e:
    raise ConfigError(f'{found!r} can not be read ({e}): {_get_it()}.') from e


def _file_in(folder: str) -> str:
  paths = [os.path.join(folder, name) for name in _NAMES]
  for path in paths:
    if os.path.isfile(path):
      return path
  raise ConfigError(f'there is no {" and no ".join(_NAMES)} in {folder!r}: {_get_it()}.')


def _get_it() -> str:
  return f'get {_URL} and give its path with {locations.how_to_set_data(_MACRO)}'


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
      f'{path!r} is not enwik8, which has SHA-1 {sha1} and {_SIZE:,} bytes: this is {found}; '
      f'{_get_it()}.'
    )
  return np.frombuffer(data, np.uint8)


def documents(split: str) -> list[np.ndarray]:
  """Returns the one document of a split, a view of the corpus."""
  start, end = _SPLITS[split]
  return [corpus()[start:end]]


indexed.byte_level_task('enwik8', documents, splits=tuple(_SPLITS))
