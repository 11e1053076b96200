"""Enwik8 from a stand-in of its size: byte-exact splits, and clear refusals of anything else."""

import hashlib
import zipfile

import gin
import numpy as np
import pytest
import seqio
from data_util import enwik8_stand_in, sequences

from tvq_t5x.common import errors
from tvq_t5x.data import indexed
from tvq_t5x.gin_support import parsing
from tvq_t5x.tasks import enwik8

SIZE = 100_000_000
BOUNDS = {
  'train': (0, 90_000_000),
  'validation': (90_000_000, 95_000_000),
  'test': (95_000_000, SIZE),
}


@pytest.fixture(scope='module')
def stand_in(tmp_path_factory):
  """The file, its bytes and their SHA-1."""
  path = tmp_path_factory.mktemp('enwik8') / 'enwik8'
  data = enwik8_stand_in(path)
  yield path, np.frombuffer(data, np.uint8), hashlib.sha1(data).hexdigest()
  path.unlink()


@pytest.fixture(autouse=True)
def _clear(monkeypatch):
  for name in ('ENWIK8_PATH', 'TVQ_DATA_DIR'):
    monkeypatch.delenv(name, raising=False)
  gin.clear_config()
  yield
  gin.clear_config()
  enwik8._read.cache_clear()


def configure(path, sha1):
  gin.parse_config_file(f'{parsing.gin_root()}/tasks/enwik8.gin')
  gin.bind_parameter('ENWIK8_PATH/gin.macro.value', str(path))
  gin.bind_parameter('tvq_t5x.tasks.enwik8.corpus.sha1', sha1)


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_every_byte_once(stand_in, split):
  path, data, sha1 = stand_in
  configure(path, sha1)
  found = sequences('enwik8', 8192, split)
  assert len(found) == 611
  stream = np.concatenate(found)
  assert stream[-1] == 1
  start, end = BOUNDS[split]
  np.testing.assert_array_equal(stream[:-1] - 3, data[start:end])


def test_training_split(stand_in):
  path, data, sha1 = stand_in
  configure(path, sha1)
  task = seqio.get_mixture_or_task('enwik8')
  tokens, counts = task.read('train')
  assert counts == indexed.Counts(1, 90_000_001, 90_000_000, None)
  for start in (0, 44_444_444, 89_991_809):
    np.testing.assert_array_equal(tokens[start : start + 8192][:8191] - 3, data[start:][:8191])
  assert tokens[90_000_000:].tolist() == [1]
  shuffled = task.get_dataset({'targets': 8192}, split='train', seed=0)
  windows = data[: 90_000_000 // 8192 * 8192].reshape(-1, 8192)
  places = {window[:64].tobytes(): i for i, window in enumerate(windows)}
  rows = [example['targets'] - 3 for example in shuffled.take(5).as_numpy_iterator()]
  found = [places[row[:64].astype(np.uint8).tobytes()] for row in rows]
  np.testing.assert_array_equal(rows, windows[found])
  assert len(set(found)) == 5 and found != sorted(found)


def test_the_file_is_mapped_and_not_read_into_memory(stand_in):
  path, data, sha1 = stand_in
  configure(path, sha1)
  (document,) = enwik8.documents('test')
  with path.open('r+b') as f:
    f.seek(SIZE - 1)
    f.write(bytes([data[-1] ^ 1]))
    f.flush()
    assert document[-1] == data[-1] ^ 1
    f.seek(SIZE - 1)
    f.write(bytes([data[-1]]))


def test_zip(stand_in, tmp_path, monkeypatch):
  path, data, sha1 = stand_in
  archive = tmp_path / 'enwik8.zip'
  with zipfile.ZipFile(archive, 'w') as f:
    f.write(path, 'enwik8')
  configure('', sha1)
  monkeypatch.setenv('ENWIK8_PATH', str(archive))
  tokens = seqio.get_mixture_or_task('enwik8').read('test').tokens
  np.testing.assert_array_equal(tokens[:5_000_000] - 3, data[95_000_000:])


@pytest.mark.parametrize('name', ['TVQ_DATA_DIR', 'ENWIK8_PATH'])
def test_a_folder(stand_in, tmp_path, monkeypatch, name):
  path, data, sha1 = stand_in
  configure('', sha1)
  (tmp_path / 'enwik8').symlink_to(path)
  monkeypatch.setenv(name, str(tmp_path))
  np.testing.assert_array_equal(enwik8.documents('test')[0], data[95_000_000:])


def test_another_file_of_the_same_size(stand_in, monkeypatch):
  path, _, sha1 = stand_in
  monkeypatch.setenv('ENWIK8_PATH', str(path))
  with pytest.raises(errors.ConfigError, match='is not enwik8') as e:
    sequences('enwik8', 8192, 'test')
  real = '57b8363b814821dc9d47aa4d41f58733519076b2'
  for part in (str(path), sha1, real, 'mattmahoney.net/dc/enwik8.zip', 'ENWIK8_PATH'):
    assert part in str(e.value)


def _bad_zip(path):
  path.write_bytes(b'PK\x03\x04 is how a zip starts')


def _other_zip(path):
  with zipfile.ZipFile(path, 'w') as f:
    f.writestr('enwik8', 'short')


@pytest.mark.parametrize(
  ('write', 'words'),
  [
    (None, 'can not be read'),
    (lambda path: path.mkdir(), 'there is no enwik8 and no enwik8.zip in'),
    (lambda path: path.write_bytes(b'short'), 'is not enwik8.*not 100,000,000 bytes'),
    (lambda path: path.write_bytes(b''), 'is not enwik8.*not 100,000,000 bytes'),
    (_bad_zip, 'is not enwik8'),
    (_other_zip, 'is not enwik8.*not 100,000,000 bytes'),
  ],
  ids=['nothing', 'a folder', 'short', 'empty', 'a bad zip', 'another zip'],
)
def test_refusals_say_where_to_get_it(tmp_path, monkeypatch, write, words):
  path = tmp_path / 'enwik8'
  if write:
    write(path)
  monkeypatch.setenv('ENWIK8_PATH', str(path))
  with pytest.raises(errors.ConfigError, match=words) as e:
    sequences('enwik8', 8192, 'test')
  for part in (repr(str(path)), 'mattmahoney.net/dc/enwik8.zip', 'ENWIK8_PATH', '--data_dir'):
    assert part in str(e.value)


def test_without_a_path():
  with pytest.raises(errors.ConfigError, match='ENWIK8_PATH is not set.*mattmahoney.net'):
    sequences('enwik8', 8192, 'test')
