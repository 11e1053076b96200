"""`lra_image`: CIFAR-10 in gray, pixel by pixel; 10 classes.

Part of the Long Range Arena. Read from TFDS's `cifar10:3.0.2`: the first 45,000 training images
train, the last 5,000 validate, the 10,000 test images test. A pixel is a real number from -1 to 1,
the luma 0.299 R + 0.587 G + 0.114 B (ITU-R 601) rounded to 8 bits; an image is a sequence of 1,024
from the top left. Nothing is augmented.
"""

import functools

import numpy as np

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import classification, corpora, documents, locations
from tvq_t5x.gin_support.configurables import configurable
from tvq_t5x.tasks import images  # pyright: ignore[reportMissingImports]

_MACRO = 'CIFAR10_PATH'
_NAME = 'cifar10:3.0.2'
_SHAPE = (32, 32, 3)
_SPLITS = {'train': 'train[:45000]', 'validation': 'train[45000:]', 'test': 'test'}


@configurable
def corpus(path: str | None = None) -> corpora.TfdsCorpus:
  """Where the images lie.

  Args:
    path: of TFDS's data directory; macro CIFAR10_PATH. None means the environment variable
      CIFAR10_PATH, or else the folder of --data_dir, or else TFDS's default.
  """
  return corpora.TfdsCorpus(_NAME, 'image', _SPLITS, locations.data_path(_MACRO, path), _MACRO)


def luma(image: np.ndarray) -> np.ndarray:
  """The brightness [height, width] uint8 of an image [height, width, 3] uint8."""
  red, green, blue = np.moveaxis(image.astype(np.int32), -1, 0)
  return ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)


class _Images:
  """Images in memory; see `classification.Examples`."""

  def __init__(self, pixels: np.ndarray, labels: np.ndarray):
    self._pixels, self._labels = pixels, labels

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> classification.Example:
    return classification.Example(
      images.real_numbers(self._pixels[index]), int(self._labels[index])
    )


def examples(split: str) -> _Images:
  """The images of a split."""
  found = corpus()
  return _read(found.data_dir, found.splits[split], found.identity(split)['record'])


@functools.lru_cache(maxsize=3)
def _read(data_dir: str | None, which: str, record: str) -> _Images:
  del record  # Another dataset at the same place is another entry of the cache.
  found = corpora.TfdsCorpus(_NAME, 'image', {which: which}, data_dir, _MACRO)
  pixels, labels = [], []
  for example in documents.examples(found.examples(which)):
    if example['image'].shape != _SHAPE:
      raise ConfigError(
        f'{_NAME} in {found.folder} has an image of shape {example["image"].shape}, not {_SHAPE}.'
      )
    pixels.append(luma(example['image']))
    labels.append(example['label'])
  return _Images(np.array(pixels), np.array(labels))


classification.register(
  'lra_image',
  __name__,
  examples,
  splits=tuple(_SPLITS),
  num_classes=10,
  sequence_len=_SHAPE[0] * _SHAPE[1],
)
