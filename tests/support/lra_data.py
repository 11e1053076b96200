"""Small data sets of the Long Range Arena, in the files in which they are published."""

import functools
import io
import pathlib

import numpy as np
import PIL.Image
import seqio
import tensorflow_datasets as tfds
from data_util import store_as_tfds

from tvq_t5x.data import classification
from tvq_t5x.data.feature_converters import ClassificationFeatureConverter

LISTOPS = {
  'train': [('( ( ( [MAX 2 ) 9 ) ] )', 9), ('5', 5), ('( ( ( [SM 9 ) 4 ) ] )', 3)],
  'val': [('( ( ( ( [MED 2 ) 9 ) 3 ) ] )', 3)],
  'test': [('( ( ( [MIN ( ( ( [MAX 1 ) 2 ) ] ) ) 7 ) ] )', 2), ('0', 0)],
}
PAIRS = {
  'train': [(0, 'a "quoted', 'other" text'), (1, 'x' * 5000, 'caf\u00e9'), (1, '', 'y')],
  'eval': [(1, 'p', 'q')],
  'test': [(0, 'one', 'two'), (1, 'three', 'four')],
}
REVIEWS = {
  'train': [('good ' * i, i % 2) for i in range(1, 9)],
  'test': [('bad', 0), ('caf\u00e9', 1), ('z' * 5000, 1)],
}
IMAGES = {
  split: np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)
  for seed, (split, n) in enumerate({'train': 7, 'test': 3}.items())
}
# Those of a split are i % 10.
NUM_PATHS = 20


def listops(folder: pathlib.Path, line_end: str = '\r\n') -> None:
  """Writes ListOps."""
  folder.mkdir(parents=True, exist_ok=True)
  for split, rows in LISTOPS.items():
    lines = ['Source\tTarget', *(f'{text}\t{value}' for text, value in rows), '']
    (folder / f'basic_{split}.tsv').write_bytes(line_end.join(lines).encode())


def retrieval(folder: pathlib.Path) -> None:
  """Writes pairs of papers."""
  folder.mkdir(parents=True, exist_ok=True)
  for split, rows in PAIRS.items():
    lines = [f'{label}.0\tid{i}\tJ{i}\t{a}\t{b}\n' for i, (label, a, b) in enumerate(rows)]
    (folder / f'new_aan_pairs.{split}.tsv').write_bytes(''.join(lines).encode())


def text(folder: pathlib.Path) -> None:
  """Writes reviews as TFDS prepares them."""
  features = {'text': tfds.features.Text(), 'label': tfds.features.ClassLabel(num_classes=2)}
  splits = {
    split: [{'text': review, 'label': label} for review, label in rows]
    for split, rows in REVIEWS.items()
  }
  store_as_tfds(folder, 'imdb_reviews/plain_text:1.0.0', features, splits)


def image(folder: pathlib.Path, side: int = 32) -> None:
  """Writes CIFAR-10 as TFDS prepares it."""
  features = {
    'id': tfds.features.Text(),
    'image': tfds.features.Image(shape=(side, side, 3)),
    'label': tfds.features.ClassLabel(num_classes=10),
  }
  splits = {
    split: [
      {'id': f'{split}_{i}', 'image': x[:side, :side], 'label': i % 10} for i, x in enumerate(found)
    ]
    for split, found in IMAGES.items()
  }
  store_as_tfds(folder, 'cifar10:3.0.2', features, splits)


def path_image(number: int, side: int) -> np.ndarray:
  """The pixels of an image of `pathfinder`, [side, side] uint8."""
  return np.random.default_rng(number).integers(0, 256, (side, side)).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
  """A PNG."""
  buffer = io.BytesIO()
  PIL.Image.fromarray(pixels).save(buffer, 'png')
  return buffer.getvalue()


def pathfinder(folder: pathlib.Path, side: int = 32) -> None:
  """Writes images of paths in two folders, of which the second is number 10."""
  where = folder / f'pathfinder{side}' / 'curv_contour_length_14'
  (where / 'metadata').mkdir(parents=True)
  for k, part in (('2', range(NUM_PATHS // 2)), ('10', range(NUM_PATHS // 2, NUM_PATHS))):
    (where / 'imgs' / k).mkdir(parents=True)
    lines = []
    for i in part:
      (where / 'imgs' / k / f'sample_{i}.png').write_bytes(png(path_image(i, side)))
      lines.append(f'imgs/{k} sample_{i}.png {i} {i % 3 % 2} 1.0 2 3 4\n')
    (where / 'metadata' / f'{k}.npy').write_text(''.join(lines))


# By task: what writes its files, its setting, and T.
TASKS = {
  'lra_listops': (listops, 'LISTOPS_PATH', 2000),
  'lra_text': (text, 'IMDB_PATH', 4096),
  'lra_retrieval': (retrieval, 'AAN_PATH', 4000),
  'lra_image': (image, 'CIFAR10_PATH', 1024),
  'lra_pathfinder': (pathfinder, 'PATHFINDER_PATH', 1024),
  'lra_pathx': (functools.partial(pathfinder, side=128), 'PATHFINDER_PATH', 16384),
}


def write(folder: pathlib.Path) -> None:
  """Writes all of them into one folder."""
  for write_task, _, _ in TASKS.values():
    write_task(folder)


def converter(task: str) -> functools.partial[ClassificationFeatureConverter]:
  """What makes the feature converter of a task that is registered."""
  found = classification.format_of(seqio.get_mixture_or_task(task))
  return functools.partial(
    ClassificationFeatureConverter, real_inputs=found.vocabulary is None, pair=found.pair
  )
