"""Images as a PNG file."""

import math
import os

import numpy as np
from matplotlib import image as matplotlib_image

_GAP = 2  # Pixels between images.


def write_grid(path: str | os.PathLike[str], images: np.ndarray) -> None:
  """Writes images side by side into one PNG file, about as many rows as columns.

  Args:
    path: of the file.
    images: [N, height, width, 3] uint8, at least one.
  """
  number, height, width, channels = images.shape
  columns = math.ceil(math.sqrt(number))
  rows = math.ceil(number / columns)
  size = rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels
  grid = np.full(size, 255, np.uint8)
  for i, image in enumerate(images):
    top, left = i // columns * (height + _GAP), i % columns * (width + _GAP)
    grid[top : top + height, left : left + width] = image
  matplotlib_image.imsave(path, grid, format='png')
