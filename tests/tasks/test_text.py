"""Own texts: every byte of every source once, in a split that its text decides, in any format."""

import gzip
import json
import os
import zlib

import gin
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seqio
import zstandard
from data_util import ODD_NAME, processor, sentencepiece_model, sequences, store_as_tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tvq_t5x import train
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import datasets, text_files
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter
from tvq_t5x.gin_support import parsing
from tvq_t5x.tasks import text

SPLITS = ('train', 'validation', 'test')
# Empty, a byte order mark, CRLF, no UTF-8, no line feed at the end, one huge line.
TEXTS = (
  b'',
  b'\xef\xbb\xbfmark\n',
  b'one\r\ntwo\r\n\r\n',
  b'caf\xe9 \xff\x00\n',
  'na\u00efve \u4e2d\u6587 \U0001f600'.encode(),
  b'x' * 3_000_001,
)


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
  names = ('TEXT_FILES', 'TFDS_DATA_DIR', 'SENTENCEPIECE_MODEL', 'TOKEN_CACHE_DIR', 'TVQ_DATA_DIR')
  for name in names:
    monkeypatch.setenv(name, '')
  gin.clear_config()
  text.text_task.tell_once.cache_clear()
  yield
  gin.clear_config()


def configure(**values):
  """Sets macros of gin/tasks/text.gin."""
  gin.clear_config()
  gin.parse_config_file(f'{parsing.gin_root()}/tasks/text.gin')
  for name, value in values.items():
    gin.bind_parameter(f'{name}/gin.macro.value', value)


def write(folder, texts, ending='.txt', compress=bytes):
  folder.mkdir(parents=True, exist_ok=True)
  for i, content in enumerate(texts):
    (folder / f'{i:03d}{ending}').write_bytes(compress(content))
  return str(folder)


def tokens(split):
  found = seqio.get_mixture_or_task('text').read(split).tokens
  return found[0 : len(found)].tolist()


def documents(split):
  """What the tokens of a split say, document by document."""
  found = bytes(0 if token == 1 else token - 2 for token in tokens(split))
  assert found.endswith(b'\0')
  return found[:-1].split(b'\0')


def as_bytes(content):
  return bytes((value + 1) % 256 for value in content)


def _check_all(texts, shown=documents):
  """The splits hold these documents, each once."""
  found = [document for split in SPLITS for document in shown(split)]
  assert sorted(found) == sorted(map(as_bytes, texts))


def many(number):
  return [f'document {i}\n'.encode() * (i % 3 + 1) for i in range(number)]


@pytest.mark.parametrize(
  ('ending', 'compress'),
  [
    ('.txt', bytes),
    ('.txt.gz', gzip.compress),
    ('.zst', zstandard.compress),
    # Several frames, of which the second ends a file.
    ('.gz', lambda x: gzip.compress(x[:2]) + gzip.compress(x[2:])),
    ('.txt.zst', lambda x: zstandard.compress(x[:2]) + zstandard.compress(x[2:])),
  ],
)
def test_files_are_read_as_they_are(tmp_path, caplog, ending, compress):
  """None is held out: others validate and test."""
  folder = write(tmp_path / 'a', TEXTS, ending, compress)
  other = write(tmp_path / 'b', [b'other'])
  configure(TEXT_FILES=folder, TEXT_VALIDATION_FILES=other, TEXT_TEST_FILES=other)
  whole = [token for content in TEXTS for token in [*(x + 3 for x in content), 1]]
  assert tokens('train') == whole
  assert tokens('validation') == [*(x + 3 for x in b'other'), 1]
  told = [r.message for r in caplog.records if 'read as they are' in r.message]
  assert len(told) == 1
  for words in (
    'of 6 documents 1 are empty',
    '1 begin with a byte order mark',
    '1 have line ends of carriage return and line feed',
    '1 have bytes that are no UTF-8',
  ):
    assert words in told[0]
  caplog.clear()
  assert tokens('train') == whole
  assert not caplog.records  # It is in the cache, and was told.


def test_lines(tmp_path):
  folder = write(tmp_path, [b'one\ntwo\r\n\nfour', b'', b'\n'])
  configure(
    TEXT_FILES=folder,
    TEXT_VALIDATION_FILES=folder + '/000*',
    TEXT_TEST_FILES=folder + '/001*',
    TEXT_DOCUMENTS='lines',
  )
  assert documents('validation') == [*map(as_bytes, [b'one', b'two\r', b'', b'four'])]
  assert documents('train') == [b'']  # The others do not train.
  with pytest.raises(ConfigError, match="files of 'test' have no text"):
    seqio.get_mixture_or_task('text').find('test')


def _jsonl(path, texts):
  lines = [json.dumps({'id': i, 'body': x.decode()}) for i, x in enumerate(texts)]
  path.write_text('\ufeff' + '\n\n'.join(lines))


def _parquet(path, texts):
  table = pa.table({'id': range(len(texts)), 'body': [x.decode() for x in texts]})
  pq.write_table(table, path, row_group_size=7)


def _arrow(path, texts):
  table = pa.table({'body': [x.decode() for x in texts]})
  with pa.OSFile(str(path), 'wb') as f, pa.ipc.new_file(f, table.schema) as writer:
    writer.write_table(table, max_chunksize=7)


_TABLES = {'.jsonl': _jsonl, '.parquet': _parquet, '.arrow': _arrow}


@pytest.mark.parametrize('ending', _TABLES)
def test_records(tmp_path, ending):
  _TABLES[ending](tmp_path / f'table{ending}', many(100))
  configure(TEXT_FILES=str(tmp_path), TEXT_FIELD='body')
  _check_all(many(100))
  assert len(documents('train')) > len(documents('validation')) > 0


def test_a_data_set_of_hugging_face(tmp_path):
  """As `DatasetDict.save_to_disk` writes it, in files whose order state.json says."""
  for split, texts in (('train', many(30)), ('test', [b'one', b'two'])):
    folder = tmp_path / split
    folder.mkdir()
    names = [f'data-0000{i}-of-00002.arrow' for i in (1, 0)]
    half = len(texts) // 2
    for name, part in zip(names, (texts[:half], texts[half:]), strict=True):
      table = pa.table({'text': [x.decode() for x in part]})
      with pa.OSFile(str(folder / name), 'wb') as f, pa.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table)
    files = [{'filename': name} for name in names]
    (folder / 'state.json').write_text(json.dumps({'_data_files': files}))
    (folder / 'dataset_info.json').write_text('{}')
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
  configure(TEXT_FILES=str(tmp_path), TEXT_HELD_OUT_SHARE=0.2)
  assert documents('test') == [as_bytes(b'one'), as_bytes(b'two')]
  train, validation = documents('train'), documents('validation')
  assert validation and sorted(train + validation) == sorted(map(as_bytes, many(30)))
  order = [x for x in map(as_bytes, many(30)) if x in train]
  assert train == order
  state = json.loads((tmp_path / 'train' / 'state.json').read_text())
  state['_indices_data_files'] = [{'filename': 'indices.arrow'}]
  (tmp_path / 'train' / 'state.json').write_text(json.dumps(state))
  with pytest.raises(ConfigError, match='flatten_indices'):
    tokens('train')


def test_a_dataset_of_tfds(tmp_path, monkeypatch):
  features = {'body': seqio.utils.tfds.features.Text()}
  examples = [{'body': x.decode()} for x in many(60)]
  store_as_tfds(tmp_path, 'mine:1.0.0', features, {'train': examples, 'validation': examples[:3]})
  monkeypatch.setenv('TVQ_DATA_DIR', str(tmp_path))
  configure(TEXT_TFDS='mine:1.0.0', TEXT_FIELD='body')
  assert documents('validation') == [*map(as_bytes, many(3))]
  train, test = documents('train'), documents('test')
  assert test and sorted(train + test) == sorted(map(as_bytes, many(60)))
  configure(TEXT_TFDS='mine:1.0.0')
  with pytest.raises(ConfigError, match="no feature 'text', but body"):
    seqio.get_mixture_or_task('text').find('test')


@pytest.mark.parametrize('documents_are', ['files', 'lines'])
def test_a_document_is_in_the_same_split_wherever_it_lies(tmp_path, documents_are):
  texts = [x.replace(b'\n', b' ') for x in many(24)]
  rules = {
    'TEXT_DOCUMENTS': documents_are,
    'TEXT_HOLD_OUT': 'documents',
    'TEXT_HELD_OUT_SHARE': 0.2,
  }

  def configured(name, found):
    whole = found if documents_are == 'files' else [b'\n'.join(found[:5]), b'\n'.join(found[5:])]
    configure(TEXT_FILES=write(tmp_path / name, whole), **rules)

  configured('a', texts)
  _check_all(texts)
  splits = {split: set(documents(split)) for split in SPLITS}
  assert all(splits.values())
  # Other names, another order and number, and twice.
  configured('b', [*reversed(texts[::2]), *texts[::2], *many(30)[24:]])
  kept = set(map(as_bytes, texts[::2]))
  for split in SPLITS:
    found = documents(split)
    assert set(found) & kept == splits[split] & kept
    assert all(found.count(x) == 2 for x in kept & set(found))


@settings(
  max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.text('a\u00e9\u4e2d\U0001f600', max_size=60), min_size=1, max_size=3))
def test_the_ends_of_few_files_are_held_out(tmp_path_factory, texts):
  folder = write(tmp_path_factory.mktemp('ends'), [x.encode() for x in texts])
  configure(TEXT_FILES=folder)
  corpus = text.corpus()
  assert corpus.holds_out_ends
  for source, content in zip(corpus.sources['train'], texts, strict=True):
    parts = {
      split: b''.join(
        block for x in corpus.read(split) if x.source == source for block in x.blocks()
      )
      for split in SPLITS
    }
    assert b''.join(parts.values()) == content.encode()
    for part in parts.values():
      part.decode()  # No character is cut.
    size = len(content.encode())
    for split in SPLITS[1:]:
      assert abs(len(parts[split]) - size / 20) <= 4


@pytest.mark.parametrize('compress', [bytes, zstandard.compress])
def test_pieces(tmp_path, compress):
  content = ('the sea and the ship \u00e9\n' * 60_000).encode()
  ending = '.txt' if compress is bytes else '.zst'
  folder = write(tmp_path / 'a', [content, b'', b'end'], ending, compress)
  model = sentencepiece_model(tmp_path)
  other = write(tmp_path / 'b', [b'the sea'])
  given = {'TEXT_VALIDATION_FILES': other, 'TEXT_TEST_FILES': other}
  configure(TEXT_FILES=folder, SENTENCEPIECE_MODEL=model, **given)
  pieces = processor(model)
  assert datasets.vocab_size('text') == 304
  texts = [content, b'', b'end']
  assert tokens('train') == [t for x in texts for t in [*pieces.encode(x.decode()), 1]]
  (tmp_path / 'b' / '000.txt').write_bytes(b'\xff')
  with pytest.raises(ConfigError, match=r'000\.txt is no text in UTF-8'):
    tokens('validation')


def test_seqio_gets_whole_documents(tmp_path):
  folder = write(tmp_path / 'a', [b'one', b'two'])
  configure(TEXT_FILES=folder, TEXT_VALIDATION_FILES=folder, TEXT_TEST_FILES=folder)
  with pytest.raises(ConfigError, match='no file is left'):
    seqio.get_mixture_or_task('text').find('train')
  assert documents('test') == [as_bytes(b'one'), as_bytes(b'two')]  # Enough to evaluate.
  other = write(tmp_path / 'b', [b'three'])
  configure(TEXT_FILES=folder, TEXT_VALIDATION_FILES=other, TEXT_TEST_FILES=other)
  found = sequences('text', None, 'train')
  assert [bytes(x - 3 for x in found[i][:-1]) for i in range(2)] == [b'one', b'two']


def test_counts(tmp_path):
  configure(TEXT_FILES=write(tmp_path, many(9)))
  cfg = datasets.DatasetConfig('text', {'targets': 64}, 'train', 2, False, 0)
  before = datasets.survey(cfg)
  assert not (tmp_path / 'token_cache').exists()  # It writes nothing.
  found = [bytes(x) for x in documents('train')]
  assert before.documents == len(found)
  assert before.text_bytes == sum(map(len, found)) == before.tokens - before.documents
  assert datasets.survey(cfg) == before
  configure(TEXT_FILES=str(tmp_path), SENTENCEPIECE_MODEL=sentencepiece_model(tmp_path))
  assert datasets.survey(cfg).tokens == 0


def test_a_pipe_in_a_folder_is_waited_for_by_nobody(tmp_path):
  write(tmp_path, many(9))
  os.mkfifo(tmp_path / 'pipe.txt')
  found = text_files.find([str(tmp_path)], 'TEXT_FILES')
  assert found.others == (str(tmp_path / 'pipe.txt'),)
  with pytest.raises(ConfigError, match='pipe.txt; give a file'):
    text_files.find([str(tmp_path / 'pipe.txt')], 'TEXT_FILES')


def test_a_dry_run_says_what_there_is(tmp_path, capsys):
  folder = write(tmp_path / 'texts', [b'a' * 1000, b'b' * 200, b''])
  bindings = ['BATCH_SIZE = 8', f'MODEL_DIR = {str(tmp_path / "run")!r}']
  assert train.run(['gin/text_tiny.gin'], bindings, data_dir=folder, dry_run=True) == 0
  table = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
  assert table == [
    ['split', 'documents', 'bytes', 'tokens'],
    ['train', '3', '1,080', '1,083'],
    ['validation', '2', '60', '62'],
    ['test', '2', '60', '62'],
  ]
  assert sorted(path.name for path in tmp_path.iterdir()) == ['texts']
  assert len(list((tmp_path / 'texts').iterdir())) == 3


def test_what_defines_the_run_is_in_its_identity(tmp_path):
  cfg = datasets.DatasetConfig('text', {'targets': 64}, 'train', 2, False, 0)

  def identity(**values):
    configure(**values)
    return datasets.identity(cfg)['data']

  first = identity(TEXT_FILES=write(tmp_path / 'a', TEXTS))
  assert first == identity(TEXT_FILES=write(tmp_path / 'b', TEXTS))  # Wherever it lies.
  different = [
    identity(TEXT_FILES=write(tmp_path / 'c', TEXTS[1:])),
    identity(TEXT_FILES=str(tmp_path / 'a'), TEXT_HELD_OUT_SHARE=0.1),
    identity(TEXT_FILES=str(tmp_path / 'a'), TEXT_DOCUMENTS='lines'),
    identity(TEXT_FILES=str(tmp_path / 'a'), TEXT_VALIDATION_FILES=str(tmp_path / 'c')),
  ]
  assert len({str(x) for x in [first, *different]}) == 5
  (words,) = datasets.differences({'data': first}, {'data': different[0]})
  assert 'the data is text: ' in words and 'in 5 files' in words and 'in 6 files' in words


def test_any_name_and_what_is_not_read(tmp_path, caplog, monkeypatch):
  folder = tmp_path / ODD_NAME
  write(folder / 'deep' / ODD_NAME, many(3))
  for name in ('.hidden.txt', 'notes.md', 'deep/photo.jpg'):
    (folder / name).write_bytes(b'no')
  configure(TEXT_FILES=str(folder))
  caplog.set_level('INFO')
  for _ in range(2):
    for split in SPLITS:
      tokens(split)
  first = tokens('train')
  assert len(first) > 3
  told = [r.message for r in caplog.records if 'are not read' in r.message]
  assert len(told) == 1 and '2 files of other kinds' in told[0]
  assert list(folder.rglob('token_cache'))
  (folder / 'deep' / 'round').symlink_to(folder)
  (tmp_path / 'link').symlink_to(folder)
  configure(TEXT_FILES=str(tmp_path / 'link'))
  assert tokens('train') == first
  configure(TEXT_FILES=f'{tmp_path}/link/deep/**/*', TEXT_HOLD_OUT='ends')
  read = {x.path for x in text.corpus().sources['train']}
  assert read and not any('token_cache' in path for path in read)  # Its files are no texts.
  monkeypatch.setenv('TVQ_DATA_DIR', str(folder / 'notes.md'))  # One that is named is read.
  configure()
  assert documents('train') == [as_bytes(b'n')] or documents('train') == [as_bytes(b'no')]


@pytest.mark.parametrize(
  ('values', 'words'),
  [
    ({}, r'^TEXT_FILES is not set: .*--gin.TEXT_FILES=.*--data_dir='),
    ({'TEXT_FILES': 'a/none.txt'}, r'^TEXT_FILES: there is no a/none\.txt; give a file'),
    ({'TEXT_FILES': 'a/*.none'}, r'^TEXT_FILES: there is no a/\*\.none'),
    ({'TEXT_FILES': 'gs://bucket/x'}, 'is not on this machine'),
    ({'TEXT_FILES': ['a', 3]}, '^TEXT_FILES = .* give paths'),
    ({'TEXT_FILES': 'empty'}, r'empty holds no file of \.txt, \.jsonl'),
    ({'TEXT_FILES': 'a', 'TEXT_DOCUMENTS': 'words'}, "^TEXT_DOCUMENTS = 'words' .* 'lines' or"),
    ({'TEXT_FILES': 'a', 'TEXT_DOCUMENTS': 'records'}, r'000\.txt is no table .* give .files. or'),
    ({'TEXT_FILES': 'a', 'TEXT_HOLD_OUT': 'end'}, "^TEXT_HOLD_OUT = 'end' is not accepted"),
    ({'TEXT_FILES': 'a', 'TEXT_HOLD_OUT': 'documents'}, "^'validation' has no text: .*TEXT_DOC"),
    ({'TEXT_FILES': 'a', 'TEXT_HELD_OUT_SHARE': 0.5}, '^TEXT_HELD_OUT_SHARE = 0.5'),
    ({'TEXT_FILES': 'bad.jsonl'}, r'bad\.jsonl, line 2 is no JSON'),
    ({'TEXT_FILES': 'null.jsonl'}, r"null\.jsonl, record 2: 'text' is NoneType, no text"),
    (
      {'TEXT_FILES': 'null.jsonl', 'TEXT_FIELD': 'x'},
      "line 1 has no field 'x': give TEXT_FIELD .--field. one of",
    ),
    ({'TEXT_FILES': 'bad.parquet'}, r'bad\.parquet can not be read'),
    ({'TEXT_FILES': 'cut.gz'}, r'cut\.gz can not be read'),
    ({'TEXT_FILES': 'cut.zst'}, r'cut\.zst can not be read: it ends within a frame'),
    ({'TEXT_FILES': 'a', 'TEXT_TFDS': 'x:1.0.0'}, '^TEXT_TFDS = .*leave TEXT_FILES out'),
    ({'TEXT_TFDS': 'x:1.0.0'}, r'TFDS has no dataset x:1\.0\.0 in .*--data_dir'),
  ],
)
def test_refusals(tmp_path, monkeypatch, values, words):
  configure(**values)
  monkeypatch.chdir(tmp_path)
  write(tmp_path / 'a', many(2))
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'bad.jsonl').write_text('{"text": "a"}\n{"text"')
  (tmp_path / 'null.jsonl').write_text('{"text": "a"}\n{"text": null}\n')
  (tmp_path / 'bad.parquet').write_bytes(b'PAR1')
  (tmp_path / 'cut.gz').write_bytes(gzip.compress(os.urandom(1000))[:-20])
  (tmp_path / 'cut.zst').write_bytes(zstandard.compress(os.urandom(1000))[:-20])
  with pytest.raises(ConfigError, match=words):
    for split in SPLITS[1:]:
      datasets.check(
        datasets.DatasetConfig('text', {'targets': 64}, split, 2, False, 0),
        TransformerVQFeatureConverter,
      )


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'zstandard', None)
  (tmp_path / 'a.zst').write_bytes(zlib.compress(b'a'))
  with pytest.raises(ConfigError, match=r"zstandard, which is not there: pip install '.*\[text\]'"):
    list(text_files.blocks(text_files.TextFile(str(tmp_path / 'a.zst'), 'text')))
