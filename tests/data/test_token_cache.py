"""Token caches: written once and whole, for one corpus and one vocabulary."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf
from data_util import BOOKS, processor, sentencepiece_model, sequences

from tvq_t5x.common import errors
from tvq_t5x.data import datasets, indexed, token_cache, token_store, vocabularies
from tvq_t5x.data.documents import Document
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter

TEXTS = [book.encode() for book in BOOKS]


@dataclasses.dataclass
class Corpus:
  folder: str
  texts: list[bytes]
  name: str = 'first'
  read: int = 0  # Texts so far.
  fails_at: int | None = None

  def dataset(self, split, start=0, stop=None):
    def texts():
      for i, text in list(enumerate(self.texts))[start:stop]:
        if i == self.fails_at:
          raise OSError('interrupted')
        self.read += 1
        yield {'targets': text}

    return tf.data.Dataset.from_generator(
      texts, output_signature={'targets': tf.TensorSpec([], tf.string)}
    )

  def num_documents(self, split):
    return len(self.texts)

  def identity(self, split):
    return {'name': self.name, 'split': split}


@pytest.fixture
def corpus(tmp_path):
  return Corpus(str(tmp_path), TEXTS)


@pytest.fixture(autouse=True)
def _clear():
  yield
  gin.clear_config()


def make_task(corpus, model, name='cached', **kwargs):
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: model)
  return token_cache.CachedTask(
    name,
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: corpus.dataset(split), ['train', 'test']
    ),
    preprocessors=indexed.text_preprocessors(),
    output_features={'targets': seqio.Feature(vocabulary, add_eos=True)},
    corpus=lambda: corpus,
    **kwargs,
  )


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return sentencepiece_model(tmp_path_factory.mktemp('model'))


def expected_tokens(model, texts=TEXTS):
  pieces = processor(model)
  return [token for text in texts for token in [*pieces.encode(text.decode()), 1]]


@pytest.mark.parametrize('length', [1, 5, 64, 10_000])
def test_tokens_are_sentencepiece_s_own(corpus, model, length):
  task = make_task(corpus, model)
  found = np.concatenate(sequences(task, length, 'train'))
  assert found.dtype == np.int32
  assert found.tolist() == expected_tokens(model)


def test_counts(corpus, model):
  counts = make_task(corpus, model).read('train').counts
  text = '\n'.join(BOOKS)
  assert counts == indexed.Counts(
    documents=len(TEXTS),
    tokens=len(expected_tokens(model)),
    text_bytes=sum(map(len, TEXTS)),
    words=len(text.split()),
  )


def test_is_written_once(corpus, model):
  task = make_task(corpus, model)
  first = task.read('train')
  assert corpus.read == len(TEXTS)
  corpus.fails_at = 0  # Nothing is read any more, by another task object neither.
  again = make_task(corpus, model).read('train')
  assert again.counts == first.counts
  assert again.tokens[:].tolist() == first.tokens[:].tolist()


@pytest.mark.parametrize('change', ['vocabulary', 'corpus', 'split', 'task'])
def test_another_one_is_not_taken_for_it(corpus, model, tmp_path, change):
  make_task(corpus, model).read('train')
  other = dataclasses.replace(corpus, read=0, texts=TEXTS[:2])
  if change == 'corpus':
    other.name = 'second'
  other_model = sentencepiece_model(tmp_path, 295) if change == 'vocabulary' else model
  name = 'other' if change == 'task' else 'cached'
  split = 'test' if change == 'split' else 'train'
  tokens = make_task(other, other_model, name).read(split).tokens
  assert tokens[:].tolist() == expected_tokens(other_model, TEXTS[:2])
  # Each has its own file: the first is still there.
  corpus.fails_at = 0
  assert make_task(corpus, model).read('train').counts.documents == len(TEXTS)


@pytest.mark.parametrize('fails_at', [0, 2])
def test_after_an_interruption_it_is_written_anew(corpus, model, fails_at):
  corpus.fails_at = fails_at
  task = make_task(corpus, model)
  with pytest.raises(Exception, match='interrupted'):
    task.read('train')
  corpus.fails_at = None
  assert task.read('train').tokens[:].tolist() == expected_tokens(model)


def _files(corpus, pattern):
  (folder,) = pathlib.Path(corpus.folder, 'token_cache').iterdir()
  return sorted(folder.glob(pattern))


@pytest.mark.parametrize('lost', ['parts/*', 'tokens/c/*/*', 'tokens/**/*'])
def test_what_is_not_whole_is_written_anew(corpus, model, lost):
  task = make_task(corpus, model)
  task.read('train')
  for path in _files(corpus, lost):
    if path.is_file():
      path.unlink()
  assert task.read('train').tokens[:].tolist() == expected_tokens(model)


@pytest.mark.parametrize('damage', ['truncated', 'changed'])
def test_damage_is_told(corpus, model, damage):
  task = make_task(corpus, model)
  task.read('train')
  (path,) = _files(corpus, 'tokens/c/*/*')
  data = bytearray(path.read_bytes())
  data[10] ^= 1
  path.write_bytes(data[:100] if damage == 'truncated' else data)
  cfg = datasets.DatasetConfig(task, {'targets': 8}, 'train', 2, shuffle=True, seed=0)
  for read in (datasets.training_batches, datasets.evaluation_batches):
    with pytest.raises(errors.ConfigError, match='token_cache.*is damaged: remove it'):
      next(read(cfg, TransformerVQFeatureConverter))


@pytest.mark.parametrize('name', ['documents', 'tokens', 'text_bytes', 'words'])
def test_a_wrong_record_is_told(corpus, model, name):
  task = make_task(corpus, model)
  task.read('train')
  (path,) = _files(corpus, 'parts/0.json')
  record = json.loads(path.read_text())
  wrong = [json.dumps({**record, name: value}) for value in (-1, 1.5, 'x', [], True, 10**30)]
  for text in (*wrong, '', '{', '[]', 'null', '{}', '[' * 100_000):
    path.write_text(text)
    with pytest.raises(errors.ConfigError, match='is damaged: remove it'):
      task.read('train')


def test_more_tokens_than_there_are_files(corpus, model):
  task = make_task(corpus, model)
  task.read('train')
  (path,) = _files(corpus, 'parts/0.json')
  path.write_text(json.dumps({**json.loads(path.read_text()), 'tokens': 10**14}))
  assert task.read('train').tokens[:].tolist() == expected_tokens(model)


def test_ids_that_stand_for_nothing_are_told(tmp_path):
  def store(num_ids):
    identity = {'dtype': 'uint16'}
    return token_store.TokenStore(str(tmp_path), 'train', identity, range(1, num_ids), 1)

  part, _ = store(300).begin({})
  store(300).write(part, [Document(np.array([5, 299]), None)])
  for num_ids in (300, 299):
    complete = store(num_ids).complete_parts()
    read = store(num_ids).open(complete).tokens
    if num_ids == 300:
      assert read[:].tolist() == [5, 299]
    else:
      with pytest.raises(errors.ConfigError, match='ids that stand for nothing'):
        read[:]


def test_the_record_says_what_the_file_is(corpus, model):
  task = make_task(corpus, model)
  counts = task.read('train').counts
  (part,) = _files(corpus, 'parts/*')
  assert json.loads(part.read_text()) == dataclasses.asdict(counts)
  vocabulary = task.output_features['targets'].vocabulary
  (identity,) = _files(corpus, 'identity.json')
  assert json.loads(identity.read_text())['vocabulary'] == vocabularies.identity(vocabulary)


def test_folder_is_a_setting(corpus, model, tmp_path, monkeypatch):
  task = make_task(corpus, model)
  monkeypatch.setenv('TOKEN_CACHE_DIR', str(tmp_path / 'a'))
  task.read('train')
  assert os.listdir(tmp_path / 'a')
  gin.bind_parameter('tvq_t5x.data.token_cache.directory.path', str(tmp_path / 'b'))
  task.read('train')
  assert os.listdir(tmp_path / 'b')


@pytest.mark.parametrize('folder', ['file/folder', 'ftp://server/folder'])
def test_a_folder_that_can_not_be_one(corpus, model, tmp_path, monkeypatch, folder):
  (tmp_path / 'file').write_text('')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('TOKEN_CACHE_DIR', folder)
  with pytest.raises(errors.ConfigError, match=r'TOKEN_CACHE_DIR.*can not be.*gs://') as e:
    make_task(corpus, model).read('train')
  assert folder in str(e.value)


def test_a_bucket(corpus, model, monkeypatch):
  monkeypatch.setenv('TOKEN_CACHE_DIR', 'memory://a bucket/folder')  # TensorStore's own stand-in.
  tokens = make_task(corpus, model).read('train').tokens
  assert tokens[:].tolist() == expected_tokens(model)
  corpus.fails_at = 0
  assert make_task(corpus, model).read('train').tokens[3:9].tolist() == tokens[3:9].tolist()
  assert not os.path.exists(f'{corpus.folder}/token_cache')


def test_a_complete_cache_needs_no_right_to_write(corpus, model):
  counts = make_task(corpus, model).read('train').counts
  before = {path: path.stat().st_mtime_ns for path in _files(corpus, '**/*')}
  assert make_task(corpus, model).read('train').counts == counts
  assert {path: path.stat().st_mtime_ns for path in _files(corpus, '**/*')} == before


MANY = [b'%d ' % i + text for i in range(75) for text in TEXTS]  # For six parts.


def test_an_interruption_costs_a_part(tmp_path, model):
  corpus = Corpus(str(tmp_path), MANY, fails_at=140)
  task = make_task(corpus, model)
  with pytest.raises(Exception, match='interrupted'):
    task.read('train')
  complete = len(_files(corpus, 'parts/*'))
  again = dataclasses.replace(corpus, fails_at=None, read=0)
  assert make_task(again, model).read('train').tokens[:].tolist() == expected_tokens(model, MANY)
  assert again.read == (6 - complete) * 50


def test_several_write_together(tmp_path, model):
  """As processes do, which share nothing but the folder."""
  corpora = [Corpus(str(tmp_path), MANY) for _ in range(3)]
  tasks = [make_task(corpus, model) for corpus in corpora]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    splits = list(pool.map(lambda task: task.read('train'), tasks))
  expected = expected_tokens(model, MANY)
  for split in splits:
    assert split.tokens[:].tolist() == expected
    assert split.counts == splits[0].counts
    assert split.counts.documents == len(MANY)
  # Each is written, and not everything by each.
  read = [corpus.read for corpus in corpora]
  assert len(MANY) <= sum(read) < 3 * len(MANY)


def test_rows_are_one_text(tmp_path, model):
  tokens = make_task(Corpus(str(tmp_path), MANY), model).read('train').tokens
  expected = expected_tokens(model, MANY)
  assert len(tokens) == len(expected)
  rng = np.random.default_rng(0)
  for start, stop in [(0, 0), (0, 10**6), (9, 5), *rng.integers(0, len(expected) + 9, (30, 2))]:
    found = tokens[start:stop]
    assert found.dtype == np.int32
    assert found.tolist() == expected[start:stop]


def test_more_tokens_than_a_file_has(tmp_path, model, monkeypatch):
  monkeypatch.setattr(token_store, '_TOKENS_OF_FILE', 512)
  monkeypatch.setattr(token_store, '_TOKENS_OF_READ', 64)
  corpus = Corpus(str(tmp_path), MANY)
  tokens = make_task(corpus, model).read('train').tokens
  assert len(_files(corpus, 'tokens/c/*/*')) > 12
  assert tokens[:].tolist() == expected_tokens(model, MANY)


def test_black_images(tmp_path):
  """All zeros, which TensorStore does not store unless it is told to."""
  corpus = Corpus(str(tmp_path), [bytes(7)] * 3)
  task = token_cache.CachedTask(
    'black',
    source=seqio.FunctionDataSource(lambda split, shuffle_files: corpus.dataset(split), ['train']),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=False)},
    corpus=lambda: corpus,
    first_id=3,
  )
  assert task.read('train').tokens[:].tolist() == [3] * 21
  assert task.read('train').counts.tokens == corpus.read * 7


def test_ids_that_do_not_fit_are_refused(corpus, model):
  task = make_task(corpus, model, first_id=2)  # EOS is 1.
  with pytest.raises(ValueError, match='document 0 has ids out of range'):
    task.read('train')


def test_looking_for_the_data_writes_nothing(corpus, model, tmp_path):
  make_task(corpus, model).check('train', {'targets': 8})
  assert corpus.read == 0
  assert not list(tmp_path.iterdir())
