"""`photos64`: 64 x 64 pieces of a few photographs, ImageNet64's setting in small.

The photographs come with the Python package `scikit-image`, all of them in the public domain or
CC0; nothing is downloaded when training. Each split has its own: what is held out is a photograph
that was not seen, not another piece of one that was. A piece starts every 32 pixels, in the
photograph itself and in two that are 2 and 4 times smaller; pieces thus overlap.

An image is one sequence of 12,288 tokens, as in `imagenet64`, and `bits_per_byte` is bits per
dimension.
"""

import hashlib
import importlib.util
import pathlib
from collections.abc import Iterator

import numpy as np
import seqio
import tensorflow as tf

from tvq_t5x.data import indexed
from tvq_t5x.tasks import images  # pyright: ignore[reportMissingImports]

_PACKAGE = 'scikit-image==0.26.0'
_SPLITS = {
  'train': ('astronaut.png', 'coffee.png', 'hubble_deep_field.jpg'),
  'validation': ('rocket.jpg',),
  'test': ('chelsea.png',),
}
_SHA256 = {
  'astronaut.png': '88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5',
  'coffee.png': 'cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7',
  'hubble_deep_field.jpg': '3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4',
  'rocket.jpg': 'c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c',
  'chelsea.png': '596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb',
}
_STRIDE = 32
_SCALES = (1, 2, 4)


def photograph(name: str) -> np.ndarray:
  """Returns a photograph of the package, [height, width, 3] uint8.

  Raises:
    ModuleNotFoundError: if the package is not installed.
    ValueError: if its photograph is another one.
  """
  found = importlib.util.find_spec('skimage')  # Not imported: only its files are needed.
  if found is None or found.origin is None:
    raise ModuleNotFoundError(
      'The task photos64 reads photographs from a Python package that is not installed: run '
      f'`pip install {_PACKAGE}`.',
      name='skimage',
    )
  data = (pathlib.Path(found.origin).parent / 'data' / name).read_bytes()
  if hashlib.sha256(data).hexdigest() != _SHA256[name]:
    raise ValueError(
      f'{name} in the installed scikit-image is not the photograph that the task photos64 is '
      f'defined on: run `pip install {_PACKAGE}`.'
    )
  if name.endswith('.png'):
    return tf.io.decode_png(data, channels=3).numpy()
  return tf.io.decode_jpeg(data, channels=3, dct_method='INTEGER_ACCURATE').numpy()


def pieces(photo: np.ndarray) -> Iterator[np.ndarray]:
  """The pieces of a photograph [height, width, 3] uint8, each of `images.SHAPE`."""
  height, width, _ = images.SHAPE
  for scale in _SCALES:
    rows, columns = photo.shape[0] // scale, photo.shape[1] // scale
    boxes = photo[: rows * scale, : columns * scale].reshape(rows, scale, columns, scale, 3)
    smaller = np.round(boxes.mean(axis=(1, 3))).astype(np.uint8)
    for top in range(0, rows - height + 1, _STRIDE):
      for left in range(0, columns - width + 1, _STRIDE):
        yield smaller[top : top + height, left : left + width]


def _dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
  del shuffle_files, seed  # An `IndexedTask` shuffles sequences.
  found = [piece for name in _SPLITS[split] for piece in pieces(photograph(name))]
  return tf.data.Dataset.from_tensor_slices({'targets': np.stack(found)})


images.image_task(
  'photos64',
  __name__,
  seqio.FunctionDataSource(_dataset, splits=tuple(_SPLITS)),
  indexed.InMemoryTask,
)
