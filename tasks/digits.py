"""`digits`: handwritten digits of 8 x 8 pixels, pixel by pixel.

The 1,797 digits come with the Python package `scikit-learn`; nothing is downloaded when training.
They are the test set of UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak,
CC BY 4.0): 250 writers' digits, which the package does not tell apart.

A third of each class is the test split, and a tenth of it validates, both drawn once and for all.
Inputs are real numbers, in raster order, -1 for white to 1 for black.
"""

import functools
import hashlib

import numpy as np

from tvq_t5x.data import classification
from tvq_t5x.data.classification import Example

_PACKAGE = 'scikit-learn==1.8.0'
# Of pixels and labels, as uint8.
_SHA256 = '87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826'
SIZE, NUM_CLASSES = 64, 10
SPLITS = ('train', 'validation', 'test')


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
  """All digits, [1797, 64] uint8 from 0 to 16, and their classes [1797] uint8.

  Raises:
    ModuleNotFoundError: if the package is not installed.
    ValueError: if its digits are others.
  """
  try:
    from sklearn.datasets import load_digits
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      'The task digits reads its images from a Python package that is not installed: run '
      f'`pip install {_PACKAGE}`.',
      name='sklearn',
    ) from e
  pixels, labels = (x.astype(np.uint8) for x in load_digits(return_X_y=True))
  if hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest() != _SHA256:
    raise ValueError(
      'The digits in the installed scikit-learn are not those that the task digits is defined on: '
      f'run `pip install {_PACKAGE}`.'
    )
  return pixels, labels


def indices(split: str) -> np.ndarray:
  """Which digits are a split's, in the package's order."""
  labels, rng, found = digits()[1], np.random.RandomState(0), []
  for label in range(NUM_CLASSES):
    of_class = rng.permutation(np.flatnonzero(labels == label))
    third, tenth = round(len(of_class) / 3), round(len(of_class) / 10)
    parts = np.split(of_class, [third, third + tenth])
    found.append(dict(zip(('test', 'validation', 'train'), parts, strict=True))[split])
  return np.sort(np.concatenate(found))


def examples(split: str) -> list[Example]:
  """The digits of a split."""
  pixels, labels = digits()
  return [Example(pixels[i] / np.float32(8) - 1, int(labels[i])) for i in indices(split)]


classification.register(
  'digits', __name__, examples, SPLITS, num_classes=NUM_CLASSES, sequence_len=SIZE
)
