"""The command that trains a vocabulary: lossless, capped, and clear where it refuses."""

import subprocess
import sys

import pytest
import tiny_task  # Registers tiny_bytes.
from data_util import BOOKS, pg19_as_published, processor
from hypothesis import given
from hypothesis import strategies as st

from tvq_t5x import train_vocab
from tvq_t5x.common import errors
from tvq_t5x.data import vocabularies, vocabulary_training

TEXT = ''.join(BOOKS)


@pytest.fixture
def text_file(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_bytes(TEXT.encode())
  return str(path)


def run(folder, task=None, inputs=(), vocab_size=300, max_bytes=10**6, output='out', **kwargs):
  return train_vocab.run(task, inputs, str(folder / output), vocab_size, max_bytes, **kwargs)


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
  for name in ('ENWIK8_PATH', 'PG19_PATH', 'TVQ_DATA_DIR'):
    monkeypatch.setenv(name, '')


@given(st.lists(st.binary(max_size=30), max_size=5))
def test_lines_do_not_depend_on_the_blocks(blocks):
  whole = b''.join(blocks)
  assert list(vocabulary_training.lines(blocks)) == list(vocabulary_training.lines([whole]))
  expected = [line.decode(errors='ignore').encode() for line in whole.split(b'\n')]
  assert list(vocabulary_training.lines(blocks)) == [line for line in expected if line]


@pytest.mark.parametrize('block', [10**5, 1000])
def test_long_lines_come_in_parts(block):
  """SentencePiece would silently drop them."""
  line = ('sea ' * 20_000).encode()
  blocks = [line[i : i + block] for i in range(0, len(line), block)]
  found = list(vocabulary_training.lines(blocks))
  assert b''.join(found) == line
  assert max(map(len, found)) < 65_536


def test_files(tmp_path, text_file):
  other = tmp_path / 'other.txt'
  other.write_text('zebra zebra zebra zebra')
  assert run(tmp_path, inputs=[text_file, str(other)]) == 0
  pieces = processor(str(tmp_path / 'out.model'))
  assert pieces.vocab_size() == 300
  assert [pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()] == [0, 1, 2, -1]
  assert 'z' in {pieces.id_to_piece(i) for i in range(300)}
  for text in (TEXT, ' \n\n  \u00e9\t\x00\ufeff', '\U0001f680 not in training \u03b1'):
    assert pieces.decode(pieces.encode(text)) == text
    assert pieces.unk_id() not in pieces.encode(text)
  vocabulary = vocabularies.SentencePieceVocabulary(lambda: str(tmp_path / 'out.model'))
  assert vocabularies.bytes_per_token(vocabulary, 300) is not None  # It says that it is lossless.
  assert not list(tmp_path.glob('*.incomplete'))


def test_the_text_is_capped(tmp_path, text_file):
  end = TEXT.index('caf')
  assert run(tmp_path, inputs=[text_file], max_bytes=end, vocab_size=285) == 0
  pieces = processor(str(tmp_path / 'out.model'))
  assert '\u00e9' not in {pieces.id_to_piece(i) for i in range(285)}


def test_task(tmp_path):
  assert run(tmp_path, task='tiny_bytes') == 0
  pieces = processor(str(tmp_path / 'out.model'))
  text = tiny_task.text('train').decode()
  assert pieces.decode(pieces.encode(text)) == text
  assert len(pieces.encode(text)) < len(text) / 2


def test_the_same_text_gives_the_same_vocabulary():
  models = {
    vocabulary_training.train(vocabulary_training.lines([TEXT.encode()]), 300) for _ in range(2)
  }
  assert len(models) == 1


def _accepted(capsys):
  """The size that the message advises."""
  message = capsys.readouterr().err
  return int(message.split('give --vocab_size=')[1].split()[0])


@pytest.mark.parametrize('vocab_size', [32_000, 200])
def test_a_refused_size_comes_with_one_that_works(tmp_path, text_file, capsys, vocab_size):
  assert run(tmp_path, inputs=[text_file], vocab_size=vocab_size) == 2
  assert not list(tmp_path.glob('out*'))
  size = _accepted(capsys)
  assert run(tmp_path, inputs=[text_file], vocab_size=size) == 0
  beyond = size + (1 if vocab_size > size else -1)
  assert run(tmp_path, inputs=[text_file], vocab_size=beyond) == 2


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ({}, ['--task', '--input']),
    ({'task': 'tiny_bytes', 'inputs': ['x']}, ['--task', '--input']),
    ({'inputs': ['/no/such/file']}, ['--input=/no/such/file']),
    ({'task': 'tiny_byte'}, ['--task=tiny_byte', 'tiny_bytes', 'pg19', 'kjv_bytes']),
    ({'task': 'photos64'}, ['--task=photos64', 'no text']),
    ({'task': 'tiny_bytes', 'output': 'no/folder/out'}, ['--output=', 'no/folder']),
    ({'task': 'enwik8'}, ['the environment variable ENWIK8_PATH or --data_dir=']),
    ({'task': 'pg19', 'data_dir': '/'}, ['PG19_PATH or --data_dir=']),
    ({'task': 'pg19', 'data_dir': 'no/folder'}, ['--data_dir=no/folder: there is no']),
  ],
)
def test_refusals(tmp_path, capsys, arguments, words):
  assert run(tmp_path, **arguments) == 2
  message = capsys.readouterr().err
  assert message.startswith('error: ') and len(message.splitlines()) == 1
  assert all(word in message for word in words)
  assert '--gin' not in message  # The command has no such flags.


def test_a_task_in_the_folder_of_the_data(tmp_path):
  pg19_as_published(tmp_path)
  assert run(tmp_path, task='pg19', data_dir=str(tmp_path), vocab_size=300) == 0
  assert processor(str(tmp_path / 'out.model')).vocab_size() == 300


def test_a_damaged_book_is_named(tmp_path, capsys):
  pg19_as_published(tmp_path)
  book = tmp_path / 'train' / '11.txt'
  book.write_bytes(book.read_bytes()[:6])  # Within a character.
  assert run(tmp_path, task='pg19', data_dir=str(tmp_path)) == 2
  message = capsys.readouterr().err
  assert message.startswith(f'error: {book} is damaged: it is no text in UTF-8')
  assert len(message.splitlines()) == 1
  assert not list(tmp_path.glob('out*'))


def test_no_text():
  with pytest.raises(errors.ConfigError, match='no text'):
    vocabulary_training.train(vocabulary_training.lines([b'\n\n']), 300)


def test_an_error_of_reading_is_not_taken_for_one_of_the_text():
  def text():
    yield b'a line'
    raise OSError('the disk is gone')

  with pytest.raises(OSError, match='the disk is gone'):
    vocabulary_training.train(text(), 300)


def test_command(tmp_path, text_file):
  output = str(tmp_path / 'out')
  command = [sys.executable, '-m', 'tvq_t5x.train_vocab', '--vocab_size=300']
  done = subprocess.run(
    [*command, f'--input={text_file}', f'--output={output}'], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert f'Wrote {output}.model, 300 pieces.' in done.stderr
  assert processor(f'{output}.model').vocab_size() == 300
