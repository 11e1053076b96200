"""The command that trains a vocabulary: lossless, capped, and clear where it refuses."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import pytest
import sentencepiece
import tiny_task  # Registers tiny_bytes.
from data_util import BOOKS, ODD_NAME, pg19_as_published, processor
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


def lines(blocks):
  left_out = vocabulary_training.LeftOut()
  return list(vocabulary_training.lines(blocks, left_out)), left_out


# Bytes of line feeds, of NUL, of whole and broken characters, U+2585 among them.
@given(
  st.lists(st.lists(st.sampled_from(list(b'a\n\0\xe2\x96\x85\xc3\xa9')), max_size=9).map(bytes))
)
def test_lines_do_not_depend_on_the_blocks(blocks):
  whole = b''.join(blocks)
  found, left_out = lines(blocks)
  assert (found, left_out) == lines([whole])
  text = whole.decode(errors='ignore')
  expected = text.replace('\0', '\n').replace('\u2585', '\n').split('\n')
  assert found == [line.encode() for line in expected if line]
  assert left_out.reserved == text.count('\0') + text.count('\u2585')
  assert left_out.not_utf8 == len(whole) - len(text.encode())


@pytest.mark.parametrize('word', ['sea ', '\u6d77', '\U0001f30a'])
@pytest.mark.parametrize('block', [10**6, 1001])
def test_long_lines_come_in_parts(block, word):
  """SentencePiece would silently drop them."""
  line = (word * 20_000).encode()
  found, left_out = lines([line[i : i + block] for i in range(0, len(line), block)])
  assert b''.join(found) == line
  assert max(map(len, found)) <= 65_536
  assert not str(left_out)


@pytest.mark.parametrize('special', ['\u2585', '\0', 'x' * 300_000])
def test_lines_that_sentencepiece_would_drop_are_learned_from(special):
  text = ''.join(f'{i} zebra{special} zebra\n' for i in range(9)).encode()
  pieces = sentencepiece.SentencePieceProcessor(
    model_proto=vocabulary_training.train(vocabulary_training.lines([text]), 280)
  )
  assert 'z' in {pieces.id_to_piece(i) for i in range(280)}
  assert pieces.decode(pieces.encode(f'{special} zebra{special}')) == f'{special} zebra{special}'


def test_what_is_left_out_is_told(tmp_path, text_file, caplog):
  assert run(tmp_path, inputs=[text_file]) == 0
  assert 'No piece was learned' not in caplog.text
  path = tmp_path / 'other.txt'
  path.write_bytes((TEXT + 'a\u2585b\0c\0').encode() + b'caf\xe9')
  assert run(tmp_path, inputs=[str(path)]) == 0
  told = 'from 3 times U+2585 or NUL, which SentencePiece keeps for itself, and 1 bytes that are no'
  assert told in caplog.text


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


def test_the_text_is_capped(tmp_path, text_file, caplog):
  end = len(TEXT[: TEXT.index('\u00e9')].encode())
  assert run(tmp_path, inputs=[text_file], max_bytes=end + 1, vocab_size=285) == 0
  pieces = processor(str(tmp_path / 'out.model'))
  assert '\u00e9' not in {pieces.id_to_piece(i) for i in range(285)}
  assert 'No piece was learned' not in caplog.text  # The half of a character is the cap's doing.


def test_any_name_of_a_file(tmp_path):
  folder = tmp_path / ODD_NAME
  folder.mkdir()
  names = [str(folder / f'{i}{ODD_NAME}.txt') for i in range(2)]
  for name, text in zip(names, [TEXT, 'zebra ' * 9], strict=True):
    pathlib.Path(name).write_text(text)
  assert run(tmp_path, inputs=names, output=f'{ODD_NAME}/{ODD_NAME}') == 0
  (tmp_path / 'both.txt').write_text(TEXT + 'zebra ' * 9)
  assert run(tmp_path, inputs=[str(tmp_path / 'both.txt')]) == 0
  same = (folder / f'{ODD_NAME}.model').read_bytes()
  assert (tmp_path / 'out.model').read_bytes() == same


def test_a_token_cache_beside_the_text_is_not_told_of(tmp_path, caplog):
  (tmp_path / 'texts' / 'token_cache').mkdir(parents=True)
  (tmp_path / 'texts' / 'a.txt').write_text(TEXT)
  (tmp_path / 'texts' / 'token_cache' / 'config.json').write_text('{}')
  assert run(tmp_path, inputs=[str(tmp_path / 'texts')]) == 0
  assert 'other kinds' not in caplog.text


def test_patterns(tmp_path, text_file):
  (tmp_path / 'a' / 'b').mkdir(parents=True)
  (tmp_path / 'a' / 'b' / 'deep.txt').write_text('zebra zebra zebra zebra')
  inputs = [text_file, f'{tmp_path}/*.txt', f'{tmp_path}/a/**/*.txt']
  assert run(tmp_path, inputs=inputs) == 0
  assert run(tmp_path, inputs=[text_file, f'{tmp_path}/a/b/deep.txt'], output='same') == 0
  assert (tmp_path / 'out.model').read_bytes() == (tmp_path / 'same.model').read_bytes()


def test_task(tmp_path):
  assert run(tmp_path, task='tiny_bytes') == 0
  pieces = processor(str(tmp_path / 'out.model'))
  text = tiny_task.text('train').decode()
  assert pieces.decode(pieces.encode(text)) == text
  assert len(pieces.encode(text)) < len(text) / 2


_OWN_TASKS = """
import seqio
import tensorflow as tf

def _source(texts):
  return seqio.FunctionDataSource(
    lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices({'text': texts}),
    splits=['train'],
  )

def _add(name, texts):
  seqio.TaskRegistry.add(
    name,
    source=_source(texts),
    preprocessors=[
      lambda dataset: dataset.map(lambda example: {'targets': example['text']}),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos_after_trim,
    ],
    # Its vocabulary is not there yet.
    output_features={'targets': seqio.Feature(seqio.SentencePieceVocabulary('/no/such/file'))},
  )

_add('own_sea', ['the sea and the sky'] * 9)
_add('own_zebra', ['zebra zebra'] * 9)
seqio.MixtureRegistry.add('own_both', ['own_sea', 'own_zebra'], default_rate=1)
"""


def test_tasks_of_a_module_of_ones_own(tmp_path, monkeypatch, capsys):
  (tmp_path / 'own_tasks_for_a_vocabulary.py').write_text(_OWN_TASKS)
  monkeypatch.syspath_prepend(tmp_path)
  assert run(tmp_path, task='own_both', module='own_tasks_for_a_vocabularies') == 2
  assert '--module = ' in capsys.readouterr().err
  assert run(tmp_path, task='own_both', module='own_tasks_for_a_vocabulary', vocab_size=285) == 0
  pieces = processor(str(tmp_path / 'out.model'))
  assert pieces.encode('zebra the', out_type=str) == ['zebra', '\u2581', 'the']


def test_the_same_text_gives_the_same_vocabulary_on_any_machine(monkeypatch):
  models = set()
  for cores in (1, 3):
    monkeypatch.setattr(os, 'cpu_count', lambda cores=cores: cores)
    text = vocabulary_training.lines([TEXT.encode()])
    models.add(vocabulary_training.train(text, 300))
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
    ({'inputs': ['/no/such/file']}, ['--input: there is no /no/such/file; ', 'pattern']),
    ({'inputs': ['/no/such/*']}, ['--input: there is no /no/such/*; ', 'pattern']),
    ({'inputs': ['x'], 'module': 'y'}, ['--module=y', '--task']),
    ({'task': 'tiny_byte'}, ['--task=tiny_byte', 'tiny_bytes', 'pg19', 'kjv_bytes']),
    ({'task': 'photos64'}, ['--task=photos64', 'no text']),
    ({'task': 'tiny_bytes', 'output': 'no/folder/out'}, ['--output=', 'no/folder']),
    ({'task': 'enwik8'}, ['the environment variable ENWIK8_PATH or --data_dir=']),
    ({'task': 'pg19', 'data_dir': '/'}, ['PG19_PATH or --data_dir=']),
    ({'task': 'tiny_bytes', 'data_dir': '/'}, ['--data_dir=/: the data does not', 'leave it out']),
    ({'inputs': ['x'], 'data_dir': '/'}, ['--data_dir=/ is where a task', 'leave it out']),
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


def test_files_of_all_kinds_and_the_task_of_own_texts(tmp_path, monkeypatch):
  texts, folder = BOOKS * 3, tmp_path / 'texts'
  folder.mkdir()
  (folder / 'a.txt').write_text(''.join(texts[:4]), newline='')
  records = [json.dumps({'body': text}) for text in texts[4:]]
  (folder / 'b.jsonl.gz').write_bytes(gzip.compress('\n'.join(records).encode()))
  assert run(tmp_path, inputs=[str(folder)], field='body') == 0
  assert run(tmp_path, inputs=[str(folder / 'a.txt')], field='body') == 2  # It has no fields.
  assert run(tmp_path, 'kjv_bytes', field='body') == 2
  pieces = processor(str(tmp_path / 'out.model'))
  assert pieces.decode(pieces.encode(TEXT)) == TEXT
  (folder / 'b.jsonl.gz').unlink()
  for split in ('train', 'validation', 'test'):
    (folder / split).mkdir()
    (folder / split / 'a.txt').write_text('zebra ' * 99)  # No piece is learned from it.
  (folder / 'a.txt').rename(folder / 'train' / 'a.txt')
  monkeypatch.setenv('SENTENCEPIECE_MODEL', '/none/yet')
  assert run(tmp_path, task='text', data_dir=str(folder), output='of_task') == 0
  assert run(tmp_path, inputs=[str(folder / 'train')], output='of_files') == 0
  assert (tmp_path / 'of_task.model').read_bytes() == (tmp_path / 'of_files.model').read_bytes()
