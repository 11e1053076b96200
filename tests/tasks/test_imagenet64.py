"""ImageNet64 from TFDS's files: pixels exact, splits by slices of the training images."""

import gin
import numpy as np
import pytest
import seqio
import tensorflow_datasets as tfds
from data_util import imagenet64_as_tfds, random_images, sequences, store_as_tfds

from tvq_t5x.common import errors
from tvq_t5x.data import datasets, indexed, vocabularies
from tvq_t5x.gin_support import parsing
from tvq_t5x.tasks import imagenet64

SIZE = 64 * 64 * 3
SPLITS = {'train': 'train[:3]', 'validation': 'train[3:]', 'test': 'validation'}
FIRST, OTHER = 'imagenet_resized/64x64:0.1.0', 'downsampled_imagenet/64x64:2.0.0'


IMAGES = {'train': random_images(0, 5), 'validation': random_images(1, 2)}
EXPECTED = {
  'train': IMAGES['train'][:3],
  'validation': IMAGES['train'][3:],
  'test': IMAGES['validation'],
}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  imagenet64_as_tfds(folder, IMAGES)
  features = {'image': tfds.features.Image(shape=(64, 64, 3), encoding_format='png')}
  splits = {split: [{'image': 255 - image} for image in found] for split, found in IMAGES.items()}
  store_as_tfds(folder, OTHER, features, splits)
  return folder


@pytest.fixture(autouse=True)
def _settings(data_dir, tmp_path, monkeypatch):
  monkeypatch.setenv('IMAGENET64_PATH', str(data_dir))
  monkeypatch.setenv('TOKEN_CACHE_DIR', str(tmp_path))
  monkeypatch.setattr(imagenet64, '_SPLITS', SPLITS)
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.mark.parametrize('split', list(EXPECTED))
@pytest.mark.parametrize('task', ['imagenet64', 'downsampled_imagenet64'])
def test_pixels_are_exact(task, split):
  found = np.stack(sequences(task, SIZE, split))
  expected = EXPECTED[split] if task == 'imagenet64' else 255 - EXPECTED[split]
  # Rows from the top, pixels from the left, red, green and blue.
  np.testing.assert_array_equal(found, expected.reshape(-1, SIZE).astype(np.int32) + 3)
  vocabulary = datasets.vocabulary(task)
  np.testing.assert_array_equal(vocabulary.images(found), expected)
  table = vocabularies.bytes_per_token(vocabulary, 264)
  assert table[found].sum() == found.size  # Bits per byte are bits per dimension.


def test_splits_are_those_of_the_paper(monkeypatch):
  monkeypatch.undo()
  corpus = imagenet64.corpus()
  assert corpus.splits == {
    'train': 'train[:1200000]',
    'validation': 'train[1200000:]',
    'test': 'validation',
  }
  assert corpus.name == FIRST


def test_the_cache_has_a_byte_for_each_value(tmp_path):
  counts = indexed.counts(seqio.get_mixture_or_task('imagenet64'), 'train')
  assert counts == indexed.Counts(3, 3 * SIZE, 3 * SIZE, None)
  (file,) = tmp_path.glob('imagenet64-train-*/tokens/c/*/*')
  assert file.stat().st_size < 1.5 * counts.tokens


@pytest.mark.parametrize('task', ['imagenet64', 'downsampled_imagenet64'])
def test_a_sequence_is_an_image(task):
  with pytest.raises(errors.ConfigError, match=r"task_feature_lengths.*\{'targets': 12288\}"):
    sequences(task, 8192, 'test')


def test_the_folder_of_the_data(data_dir, monkeypatch):
  monkeypatch.delenv('IMAGENET64_PATH')
  monkeypatch.setenv('TVQ_DATA_DIR', str(data_dir))
  assert len(sequences('imagenet64', SIZE, 'test')) == 2


def test_path_in_gin(data_dir, monkeypatch):
  monkeypatch.delenv('IMAGENET64_PATH')
  gin.parse_config_file(f'{parsing.gin_root()}/tasks/imagenet64.gin')
  gin.bind_parameter('IMAGENET64_PATH/gin.macro.value', str(data_dir))
  assert len(sequences('imagenet64', SIZE, 'test')) == 2
  assert gin.query_parameter('TASK_FEATURE_LENGTHS/gin.macro.value') == {'targets': SIZE}


@pytest.mark.parametrize(
  ('task', 'name'), [('imagenet64', FIRST), ('downsampled_imagenet64', OTHER)]
)
def test_without_data(task, name, tmp_path, monkeypatch):
  monkeypatch.setenv('IMAGENET64_PATH', str(tmp_path))
  with pytest.raises(errors.ConfigError, match=f'no dataset {name} in .*IMAGENET64_PATH'):
    sequences(task, SIZE, 'test')
