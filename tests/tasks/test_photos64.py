"""Photographs in pieces: held out by photograph, exact, and written as a PNG grid."""

import importlib.util
import sys
import types

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf
from data_util import sequences

from tvq_t5x.common import images
from tvq_t5x.data import datasets, indexed
from tvq_t5x.gin_support import parsing
from tvq_t5x.tasks import photos64

SIZE = 64 * 64 * 3


@pytest.mark.parametrize(('split', 'number'), [('train', 1494), ('validation', 281), ('test', 124)])
def test_splits(split, number):
  tokens, counts = seqio.get_mixture_or_task('photos64').read(split)
  assert counts == indexed.Counts(number, number * SIZE, number * SIZE, None)
  assert tokens.min() >= 3 and tokens.max() <= 258
  # As they come from the photographs.
  found = datasets.vocabulary('photos64').images(tokens.reshape(-1, SIZE))
  first = photos64.photograph(photos64._SPLITS[split][0])[:64, :64]
  np.testing.assert_array_equal(found[0], first)


def test_photographs_are_of_one_split():
  names = [name for found in photos64._SPLITS.values() for name in found]
  assert len(set(names)) == len(names) == 5


def test_pieces():
  photo = np.random.default_rng(0).integers(0, 256, (200, 129, 3)).astype(np.uint8)
  found = list(photos64.pieces(photo))
  # 5 x 3 of the photograph, 2 x 1 of 100 x 64 pixels, none of 50 x 32.
  assert len(found) == 5 * 3 + 2 * 1
  np.testing.assert_array_equal(found[4], photo[32:96, 32:96])
  half = photo.astype(float)[:200, :128].reshape(100, 2, 64, 2, 3).mean((1, 3))
  assert np.abs(found[16] - half[32:96, :64]).max() <= 0.5


def test_sequences_are_the_pieces_in_order():
  found = sequences('photos64', SIZE, 'test')
  expected = list(photos64.pieces(photos64.photograph('chelsea.png')))
  vocabulary = datasets.vocabulary('photos64')
  np.testing.assert_array_equal(vocabulary.images(np.stack(found)), np.stack(expected))


def test_gin_file():
  gin.parse_config_file(f'{parsing.gin_root()}/tasks/photos64.gin')
  try:
    assert gin.query_parameter('TASK_FEATURE_LENGTHS/gin.macro.value') == {'targets': SIZE}
  finally:
    gin.clear_config()


def test_missing_package(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=r'pip install scikit-image==0\.26\.0'):
    photos64.photograph('chelsea.png')


def test_another_photograph_is_refused(tmp_path, monkeypatch):
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'chelsea.png').write_bytes(b'another')
  found = types.SimpleNamespace(origin=str(tmp_path / '__init__.py'))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: found)
  with pytest.raises(ValueError, match=r'pip install scikit-image==0\.26\.0'):
    photos64.photograph('chelsea.png')


def test_the_package_is_not_imported():
  photos64.photograph('chelsea.png')
  assert 'skimage' not in sys.modules


@pytest.mark.parametrize(('number', 'rows', 'columns'), [(1, 1, 1), (2, 1, 2), (5, 2, 3)])
def test_grid(tmp_path, number, rows, columns):
  found = np.random.default_rng(0).integers(0, 256, (number, 8, 5, 3)).astype(np.uint8)
  images.write_grid(tmp_path / 'grid.png', found)
  grid = tf.io.decode_png((tmp_path / 'grid.png').read_bytes(), channels=3).numpy()
  assert grid.shape == (rows * 10 - 2, columns * 7 - 2, 3)
  for i, image in enumerate(found):
    top, left = i // columns * 10, i % columns * 7
    np.testing.assert_array_equal(grid[top : top + 8, left : left + 5], image)
