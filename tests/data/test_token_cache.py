"""Token caches: written once and whole, for one corpus and one vocabulary."""

import dataclasses
import json
import os
import threading

import gin
import numpy as np
import pytest
import seqio
import tensorflow as tf
from data_util import BOOKS, processor, sentencepiece_model, sequences

from tvq_t5x.common import errors
from tvq_t5x.data import indexed, token_cache, vocabularies

TEXTS = [book.encode() for book in BOOKS]


@dataclasses.dataclass
class Corpus:
  folder: str
  texts: list[bytes]
  name: str = 'first'
  read: int = 0  # Texts so far.
  fails_at: int | None = None

  def dataset(self, split):
    def texts():
      for i, text in enumerate(self.texts):
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
  (file,) = (name for name in os.listdir(f'{corpus.folder}/token_cache') if name.endswith('.bin'))
  size = os.path.getsize(f'{corpus.folder}/token_cache/{file}')
  assert size == 2 * first.counts.tokens


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
  assert all(name.endswith('.lock') for name in os.listdir(f'{corpus.folder}/token_cache'))
  corpus.fails_at = None
  assert task.read('train').tokens[:].tolist() == expected_tokens(model)


def _files(corpus):
  folder = f'{corpus.folder}/token_cache'
  return {name.rsplit('.', 1)[1]: f'{folder}/{name}' for name in os.listdir(folder)}


@pytest.mark.parametrize('damage', ['truncated', 'no record', 'no tokens', 'killed'])
def test_what_is_not_whole_is_written_anew(corpus, model, damage):
  task = make_task(corpus, model)
  task.read('train')
  files = _files(corpus)
  if damage == 'truncated':
    os.truncate(files['bin'], 10)
  elif damage == 'no record':
    os.remove(files['json'])
  elif damage == 'no tokens':
    os.remove(files['bin'])
  else:  # What a killed process leaves.
    os.remove(files['json'])
    os.rename(files['bin'], files['bin'] + '.incomplete')
  assert task.read('train').tokens[:].tolist() == expected_tokens(model)
  assert _files(corpus).keys() == {'bin', 'json', 'lock'}


def test_the_record_says_what_the_file_is(corpus, model):
  task = make_task(corpus, model)
  counts = task.read('train').counts
  with open(_files(corpus)['json']) as f:
    record = json.load(f)
  assert record['counts'] == dataclasses.asdict(counts)
  vocabulary = task.output_features['targets'].vocabulary
  assert record['identity']['vocabulary'] == vocabularies.identity(vocabulary)


def test_folder_is_a_setting(corpus, model, tmp_path, monkeypatch):
  corpus.folder = 'gs://bucket/data'
  task = make_task(corpus, model)
  with pytest.raises(errors.ConfigError, match='TOKEN_CACHE_DIR.*gs://bucket/data/token_cache'):
    task.read('train')
  monkeypatch.setenv('TOKEN_CACHE_DIR', str(tmp_path / 'a'))
  task.read('train')
  assert os.listdir(tmp_path / 'a')
  gin.bind_parameter('tvq_t5x.token_cache.directory.path', str(tmp_path / 'b'))
  task.read('train')
  assert os.listdir(tmp_path / 'b')


def test_a_folder_that_can_not_be_made(corpus, model, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('TOKEN_CACHE_DIR', str(tmp_path / 'file' / 'folder'))
  with pytest.raises(errors.ConfigError, match='TOKEN_CACHE_DIR.*can not be written'):
    make_task(corpus, model).read('train')


def test_a_complete_cache_needs_no_right_to_write(corpus, model, monkeypatch):
  make_task(corpus, model).read('train')

  def refuse(*args, **kwargs):
    raise AssertionError('writes')

  monkeypatch.setattr(token_cache._Cache, 'locked', refuse)
  make_task(corpus, model).read('train')


def test_one_writes_and_others_wait(corpus, model):
  results = []
  waiting = dataclasses.replace(corpus)
  reader = threading.Thread(
    target=lambda: results.append(make_task(waiting, model).read('train').counts)
  )

  class Interrupted(Corpus):
    def dataset(self, split):
      reader.start()
      return super().dataset(split)

  writing = Interrupted(**dataclasses.asdict(corpus))
  counts = make_task(writing, model).read('train').counts
  reader.join()
  assert results == [counts]
  assert (writing.read, waiting.read) == (len(TEXTS), 0)


def test_ids_that_do_not_fit_are_refused(corpus, model):
  task = make_task(corpus, model, first_id=2)  # EOS is 1.
  with pytest.raises(ValueError, match='document 0 has ids out of range'):
    task.read('train')


def test_looking_for_the_data_writes_nothing(corpus, model, tmp_path):
  make_task(corpus, model).check('train', 8)
  assert corpus.read == 0
  assert not list(tmp_path.iterdir())
