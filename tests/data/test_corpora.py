"""What TFDS prepared, in each of its formats: all documents in order, and any part of them."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_util import pg19_as_tfds, random_images, store_as_tfds

from tvq_t5x.data.corpora import TfdsCorpus

NAME = 'of_a_test/config:1.0.0'
TEXTS = [
  f'text {i}'.encode() for i in range(90)
]  # TFDS would take 16 at a time from each of several files.
IMAGES = random_images(0, 90)[:, :4, :4]
SPLITS = {'train': 'train[:80]', 'validation': 'train[80:]', 'test': 'test'}
FORMATS = [('tfrecord', None), ('tfrecord', 4), ('array_record', 4)]


@pytest.fixture(scope='module', params=FORMATS, ids=lambda x: '-'.join(map(str, x)))
def folder(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  features = {'text': tfds.features.Text(), 'image': tfds.features.Image(shape=(4, 4, 3))}
  examples = [{'text': t, 'image': x} for t, x in zip(TEXTS, IMAGES, strict=True)]
  store_as_tfds(folder, NAME, features, {'train': examples, 'test': examples[:5]}, *request.param)
  return str(folder)


def read(corpus, *which):
  return [x['targets'] for x in corpus.dataset(*which).as_numpy_iterator()]


def test_documents_are_in_order(folder):
  corpus = TfdsCorpus(NAME, 'text', SPLITS, folder, 'X')
  assert read(corpus, 'train') == TEXTS[:80]
  assert read(corpus, 'validation') == TEXTS[80:]
  assert read(corpus, 'test') == TEXTS[:5]
  assert [corpus.num_documents(split) for split in SPLITS] == [80, 10, 5]


@pytest.mark.parametrize(('start', 'stop'), [(0, 3), (2, 9), (9, 99)])
def test_part_of_a_split(folder, start, stop):
  corpus = TfdsCorpus(NAME, 'text', SPLITS, folder, 'X')
  assert read(corpus, 'validation', start, stop) == TEXTS[80:][start:stop]


def test_parts_make_the_whole(tmp_path):
  """TFDS would take 16 documents at a time from each of several files, other ones for each part."""
  features, examples = {'text': tfds.features.Text()}, [{'text': text} for text in TEXTS]
  store_as_tfds(tmp_path, NAME, features, {'train': examples}, 'tfrecord', 3, ordered=False)
  corpus = TfdsCorpus(NAME, 'text', {'train': 'train'}, str(tmp_path), 'X')
  found = read(corpus, 'train')
  assert sorted(found) == sorted(TEXTS)
  assert read(corpus, 'train', 0, 40) + read(corpus, 'train', 40, 90) == found


def test_images(folder):
  found = read(TfdsCorpus(NAME, 'image', SPLITS, folder, 'X'), 'train', 3, 6)
  np.testing.assert_array_equal(found, IMAGES[3:6])


def test_as_prepared_by_old_versions(tmp_path):
  """They did not write the features: TFDS's own code of the dataset knows them."""
  pg19_as_tfds(tmp_path)
  corpus = TfdsCorpus('pg19:0.1.1', 'book_text', {'test': 'test'}, str(tmp_path), 'X')
  expected = read(corpus, 'test')
  (tmp_path / 'pg19' / '0.1.1' / 'features.json').unlink()
  assert read(corpus, 'test', 1) == expected[1:]
