"""`lra_pathfinder` and `lra_pathx`: whether a path joins two dots, pixel by pixel; 2 classes.

Part of the Long Range Arena. Read from the folders as published, and only from the hard images:
`pathfinder32/curv_contour_length_14` (32 x 32, 1,024 pixels) and, for Path-X,
`pathfinder128/curv_contour_length_14` (128 x 128, 16,384 pixels). In each, files in `metadata` have
a line an image, with its folder, its file and its class. In the order of these files' numbers and
their lines, the first 80% train, the next 10% validate and the last 10% test.

A pixel is a real number from -1 to 1; an image is a sequence from the top left.
"""

import functools
import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import classification, locations, tables
from tvq_t5x.gin_support.configurables import configurable
from tvq_t5x.tasks import images  # pyright: ignore[reportMissingImports]

_MACRO = 'PATHFINDER_PATH'
_KIND = 'curv_contour_length_14'
# Where each split starts and ends, in per cent.
_SPLITS = {'train': (0, 80), 'validation': (80, 90), 'test': (90, 100)}
# Places in a line of metadata.
_FOLDER, _FILE, _LABEL = 0, 1, 3


@configurable
def folder(path: str | None = None) -> str:
  """Where the folders lie, in this one or in `lra_release` or `lra_release/lra_release` in it.

  Args:
    path: of the folder with `pathfinder32` and `pathfinder128`; macro PATHFINDER_PATH. None means
      the environment variable PATHFINDER_PATH, or else the folder of --data_dir.

  Raises:
    ConfigError: if it is not set.
  """
  return locations.needed_data_path(_MACRO, path, _get_it)


def _get_it() -> str:
  return (
    'unpack lra_release.gz of the Long Range Arena, and give the folder of its pathfinder32 and '
    'pathfinder128 with ' + locations.how_to_set_data(_MACRO)
  )


class _Image(NamedTuple):
  """An image in a file, and its class."""

  path: str
  label: int


class _Images:
  """A part of the images; see `classification.Examples`."""

  def __init__(self, found: list[_Image], side: int):
    self._found, self._side = found, side

  def __len__(self) -> int:
    return len(self._found)

  def __getitem__(self, index: int) -> classification.Example:
    path, label = self._found[index]
    return classification.Example(images.real_numbers(_pixels(path, self._side)), label)


def _pixels(path: str, side: int) -> np.ndarray:
  """An image [side, side] uint8."""
  try:
    with open(path, 'rb') as f:
      data = f.read()
  except OSError as e:
    raise ConfigError(f'{path!r}, which the metadata names, can not be read: {e.strerror}.') from e
  try:
    pixels = tf.io.decode_png(data, channels=1).numpy()
  except tf.errors.OpError as e:
    raise ConfigError(f'{path!r} is no PNG.') from e
  if pixels.shape != (side, side, 1):
    height, width, _ = pixels.shape
    raise ConfigError(f'{path!r} has {height} x {width} pixels, not {side} x {side}.')
  return pixels[..., 0]


def examples(split: str, side: int) -> _Images:
  """The images of a split.

  Args:
    split: of the task.
    side: pixels in a row, 32 or 128.
  """
  name = f'pathfinder{side}/{_KIND}'
  names = [os.path.join(*parts, name) for parts in ((), ('lra_release',), ('lra_release',) * 2)]
  where = tables.find(folder(), names, _get_it)
  metadata = os.path.join(where, 'metadata')
  if not os.path.isdir(metadata):
    raise ConfigError(f'there is no folder {metadata!r}: {_get_it()}.')
  numbered = [(number, name) for name in os.listdir(metadata) if (number := _number(name)) >= 0]
  files = [name for _, name in sorted(numbered)]
  status = [os.stat(os.path.join(metadata, name)) for name in files]
  found = _listed(where, tuple(files), tuple((s.st_size, s.st_mtime_ns) for s in status))
  start, end = (len(found) * per_cent // 100 for per_cent in _SPLITS[split])
  return _Images(found[start:end], side)


def _number(name: str) -> int:
  """That of a file of metadata, such as 12.npy; -1 for other files."""
  stem, extension = os.path.splitext(name)
  return int(stem) if extension == '.npy' and stem.isdecimal() else -1


@functools.lru_cache(maxsize=4)
def _listed(where: str, files: tuple[str, ...], status: tuple) -> list[_Image]:
  """All images in the order of the metadata."""
  del status  # Other files at the same place are another entry of the cache.
  found = []
  for name in files:
    path = os.path.join(where, 'metadata', name)
    with open(path, 'rb') as f:  # Called .npy, they are text.
      lines = f.read().splitlines()
    for number, line in enumerate(lines, 1):
      if line.strip():
        found.append(_image(where, line, f'{path!r}, line {number}'))
  if not found:
    raise ConfigError(f'there are no images in {os.path.join(where, "metadata")!r}: {_get_it()}.')
  return found


def _image(where: str, line: bytes, source: str) -> _Image:
  fields = line.decode(errors='replace').split()
  if len(fields) <= _LABEL:
    raise ConfigError(
      f'{source}: {len(fields)} fields; there have to be folder, file, number, class and others.'
    )
  if fields[_LABEL] not in ('0', '1'):
    raise ConfigError(f'{source}: {fields[_LABEL]!r} is no class; there are 0 and 1.')
  return _Image(os.path.join(where, fields[_FOLDER], fields[_FILE]), int(fields[_LABEL]))


for _name, _side in (('lra_pathfinder', 32), ('lra_pathx', 128)):
  classification.register(
    _name,
    __name__,
    functools.partial(examples, side=_side),
    splits=tuple(_SPLITS),
    num_classes=2,
    sequence_len=_side**2,
  )
