"""PG-19 from TFDS's files and from files as published: the same tokens, every word counted."""

import os

import gin
import numpy as np
import pytest
import seqio
from data_util import (
  ODD_NAME,
  PG19,
  pg19_as_published,
  pg19_as_tfds,
  processor,
  sentencepiece_model,
  sequences,
)

from tvq_t5x.common import errors
from tvq_t5x.data import datasets, indexed
from tvq_t5x.gin_support import parsing
from tvq_t5x.tasks import pg19


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return sentencepiece_model(tmp_path_factory.mktemp('model'))


@pytest.fixture(autouse=True)
def _settings(model, monkeypatch):
  for name in ('PG19_PATH', 'TOKEN_CACHE_DIR', 'TVQ_DATA_DIR'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('SENTENCEPIECE_MODEL', model)
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.fixture(params=[pg19_as_tfds, pg19_as_published])
def folder(request, tmp_path, monkeypatch):
  request.param(tmp_path)
  monkeypatch.setenv('PG19_PATH', str(tmp_path))
  return tmp_path


def expected_tokens(model, split):
  pieces = processor(model)
  return [token for text in PG19[split] for token in [*pieces.encode(text.strip()), 1]]


@pytest.mark.parametrize(('split', 'length'), [('train', 16), ('validation', 7), ('test', 64)])
def test_every_token_once(folder, model, split, length):
  found = sequences('pg19', length, split)
  assert all(len(tokens) == length for tokens in found[:-1])
  assert np.concatenate(found).tolist() == expected_tokens(model, split)
  assert (folder / 'token_cache').is_dir()


def test_no_server_is_asked(folder, no_network):
  assert sequences('pg19', 16, 'test')
  assert no_network == []


def test_counts(folder, model):
  texts = [text.strip() for text in PG19['test']]
  task = seqio.get_mixture_or_task('pg19')
  assert indexed.counts(task, 'test') == indexed.Counts(
    documents=3,
    tokens=len(expected_tokens(model, 'test')),
    text_bytes=sum(len(text.encode()) for text in texts),
    words=sum(len(text.split()) for text in texts),
  )


def test_settings_in_gin(tmp_path, model, monkeypatch):
  monkeypatch.delenv('SENTENCEPIECE_MODEL')
  data = tmp_path / 'data'
  data.mkdir()
  pg19_as_published(data)
  gin.parse_config_file(f'{parsing.gin_root()}/tasks/pg19.gin')
  for name, value in (
    ('PG19_PATH', data),
    ('SENTENCEPIECE_MODEL', model),
    ('TOKEN_CACHE_DIR', tmp_path / 'cache'),
  ):
    gin.bind_parameter(f'{name}/gin.macro.value', str(value))
  assert np.concatenate(sequences('pg19', 9, 'train')).tolist() == expected_tokens(model, 'train')
  assert datasets.vocabulary('pg19').vocab_size == 300
  assert list((tmp_path / 'cache').glob('pg19-train-*/parts/0.json'))
  assert not (data / 'token_cache').exists()


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    # The real corpus is known by the number of books, and of words but for a few.
    ({}, 3_007_061),
    ({'words': 3_020_000}, 3_007_061),
    ({'words': 3_100_000}, 3_100_000),
    ({'documents': 49}, 3_007_062),
  ],
)
def test_words_are_the_published_ones_of_the_real_corpus(monkeypatch, change, words):
  counts = {'documents': 50, 'tokens': 9, 'text_bytes': 9, 'words': 3_007_062, **change}
  split = indexed.IndexedSplit(np.zeros([9]), indexed.Counts(**counts))
  monkeypatch.setattr(pg19.token_cache.CachedTask, 'read', lambda self, name: split)
  task = seqio.get_mixture_or_task('pg19')
  assert indexed.counts(task, 'validation').words == words


def test_a_changed_book_is_read_again(tmp_path, model, monkeypatch):
  pg19_as_published(tmp_path)
  monkeypatch.setenv('PG19_PATH', str(tmp_path))
  sequences('pg19', 9, 'validation')
  book = tmp_path / 'validation' / '5000.txt'
  text = book.read_text().replace('x', 'y')  # Of the same size.
  book.write_text(text)
  os.utime(book, (1, 1))
  found = np.concatenate(sequences('pg19', 9, 'validation')).tolist()
  assert found == [*processor(model).encode(text), 1]


def _remove(folder):
  (folder / 'test' / '9.txt').unlink()


def _add(folder):
  (folder / 'test' / '7.txt').write_text('unknown')


def _only_training(folder):
  for split in ('validation', 'test'):
    for path in (folder / split).iterdir():
      path.unlink()
    (folder / split).rmdir()


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (_remove, '1 books of metadata.csv have no file, such as 9.txt'),
    (_add, '1 files in test/ are not in metadata.csv, such as 7.txt'),
    (_only_training, "no folder 'test'"),
  ],
)
def test_files_that_are_not_pg19(tmp_path, monkeypatch, change, words):
  pg19_as_published(tmp_path)
  change(tmp_path)
  monkeypatch.setenv('PG19_PATH', str(tmp_path))
  with pytest.raises(errors.ConfigError, match=f'^{str(tmp_path)!r} .PG19_PATH or') as e:
    sequences('pg19', 9, 'test')
  assert words in str(e.value)


def test_what_lies_beside_the_books_is_left_alone(tmp_path, model, monkeypatch):
  pg19_as_published(tmp_path)
  for name in ('.DS_Store', '._11.txt', 'Thumbs.db', '11.txt.part', '11.txt_.gstmp', '11.txt~'):
    for folder in (tmp_path, tmp_path / 'train'):
      (folder / name).write_bytes(b'\xff')
  table = tmp_path / 'metadata.csv'
  table.write_bytes(b'\xef\xbb\xbf' + table.read_bytes().replace(b'\n', b'\r\n'))
  monkeypatch.setenv('PG19_PATH', str(tmp_path))
  assert np.concatenate(sequences('pg19', 9, 'train')).tolist() == expected_tokens(model, 'train')


def test_a_half_loaded_book_is_missing(tmp_path, monkeypatch):
  pg19_as_published(tmp_path)
  (tmp_path / 'train' / '11.txt').rename(tmp_path / 'train' / '11.txt.part')
  monkeypatch.setenv('PG19_PATH', str(tmp_path))
  with pytest.raises(errors.ConfigError, match=r'1 books .* have no file, such as 11\.txt'):
    sequences('pg19', 9, 'train')


def test_a_damaged_table_is_named(tmp_path, monkeypatch):
  pg19_as_published(tmp_path)
  (tmp_path / 'metadata.csv').write_bytes(b'\xff\xfe1\x00')
  monkeypatch.setenv('PG19_PATH', str(tmp_path))
  with pytest.raises(errors.ConfigError, match=r'metadata\.csv is damaged'):
    sequences('pg19', 9, 'train')


@pytest.mark.parametrize('write', [pg19_as_tfds, pg19_as_published])
def test_any_name_of_a_folder(tmp_path, model, monkeypatch, write):
  folder = tmp_path / ODD_NAME
  folder.mkdir()
  write(folder)
  gin.parse_config_file(f'{parsing.gin_root()}/tasks/pg19.gin')
  monkeypatch.chdir(tmp_path)
  gin.bind_parameter('PG19_PATH/gin.macro.value', ODD_NAME)
  for _ in range(2):  # Written, and read.
    assert np.concatenate(sequences('pg19', 9, 'train')).tolist() == expected_tokens(model, 'train')
  assert [path.name for path in (folder / 'token_cache').iterdir()]


def test_one_split_is_enough_to_read_it(tmp_path, model, monkeypatch):
  pg19_as_published(tmp_path)
  _only_training(tmp_path)
  monkeypatch.setenv('PG19_PATH', str(tmp_path))
  assert np.concatenate(sequences('pg19', 9, 'train')).tolist() == expected_tokens(model, 'train')


def test_a_damaged_book_is_named(tmp_path, monkeypatch):
  pg19_as_published(tmp_path)
  book = tmp_path / 'test' / '33.txt'
  book.write_bytes(book.read_bytes()[:6])  # Within a character.
  monkeypatch.setenv('PG19_PATH', str(tmp_path))
  with pytest.raises(errors.ConfigError, match=f'^{book} is damaged: it is no text in UTF-8'):
    sequences('pg19', 9, 'test')


@pytest.mark.parametrize('write', [pg19_as_tfds, pg19_as_published])
def test_the_folder_of_the_data(tmp_path, model, monkeypatch, write):
  write(tmp_path)
  monkeypatch.setenv('TVQ_DATA_DIR', str(tmp_path))
  assert np.concatenate(sequences('pg19', 9, 'train')).tolist() == expected_tokens(model, 'train')


def test_without_data(tmp_path, monkeypatch):
  monkeypatch.setenv('PG19_PATH', str(tmp_path / 'nothing'))
  with pytest.raises(errors.ConfigError, match=r'no dataset pg19:0\.1\.1 in .*nothing.*PG19_PATH'):
    sequences('pg19', 9, 'train')


def test_without_a_vocabulary(folder, monkeypatch):
  monkeypatch.delenv('SENTENCEPIECE_MODEL')
  with pytest.raises(errors.ConfigError, match='SENTENCEPIECE_MODEL is not set'):
    sequences('pg19', 9, 'train')
