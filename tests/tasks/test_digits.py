"""Handwritten digits: the splits, what an example is, and what is refused."""

import sys

import numpy as np
import pytest
import seqio

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import classification, datasets
from tvq_t5x.data.feature_converters import ClassificationFeatureConverter
from tvq_t5x.tasks import digits


def test_splits_share_out_each_class():
  found = {split: digits.indices(split) for split in digits.SPLITS}
  assert {split: len(x) for split, x in found.items()} == {
    'train': 1019, 'validation': 179, 'test': 599,
  }  # fmt: skip
  assert sorted(np.concatenate(list(found.values()))) == list(range(1797))
  labels = digits.digits()[1]
  for split, share in (('test', 1 / 3), ('validation', 1 / 10)):
    shares = np.bincount(labels[found[split]]) / np.bincount(labels)
    np.testing.assert_allclose(shares, share, atol=0.004)


def test_an_example_is_an_image_in_raster_order():
  task = seqio.get_mixture_or_task('digits')
  assert classification.format_of(task) == (None, 10, False)
  dataset = task.get_dataset({'inputs': 64}, 'test', shuffle=False)
  example = next(dataset.as_numpy_iterator())
  first = digits.indices('test')[0]
  pixels, labels = digits.digits()
  np.testing.assert_array_equal((example['inputs'] + 1) * 8, pixels[first])
  assert example['label'] == [labels[first]]
  # It is an image: ink in the middle, none in the left column.
  image = pixels.reshape(-1, 8, 8).mean(axis=0)
  assert image[:, 0].max() < 1 < image[2:6, 3].min()


def test_another_length_is_refused():
  cfg = datasets.DatasetConfig('digits', {'inputs': 63}, 'train', 4, False, 0)
  with pytest.raises(ConfigError, match="give {'inputs': 64}"):
    datasets.check(cfg, lambda **kwargs: ClassificationFeatureConverter(real_inputs=True, **kwargs))


def test_without_the_package(monkeypatch):
  digits.digits.cache_clear()
  monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
  with pytest.raises(ModuleNotFoundError, match='pip install scikit-learn=='):
    digits.examples('train')


def test_other_digits_are_refused(monkeypatch):
  digits.digits.cache_clear()
  monkeypatch.setattr(
    'sklearn.datasets.load_digits', lambda return_X_y: (np.zeros([1797, 64]), np.zeros([1797]))
  )
  with pytest.raises(ValueError, match='are not those'):
    digits.examples('train')
  digits.digits.cache_clear()
