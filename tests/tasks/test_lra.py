"""The Long Range Arena from files in their published formats into batches, and what is refused."""

import shutil

import gin
import lra_data
import numpy as np
import pytest
import seqio
from lra_data import TASKS, converter

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import classification, datasets
from tvq_t5x.gin_support import parsing
from tvq_t5x.tasks import lra_image, lra_listops, lra_pathfinder, lra_retrieval, lra_text  # noqa: F401

SPLITS = list(zip(('train', 'validation', 'test'), lra_data.LISTOPS, strict=True))
AAN_SPLITS = list(zip(('train', 'validation', 'test'), lra_data.PAIRS, strict=True))
TOKENS, LENGTHS = 'encoder_input_tokens', 'encoder_lengths'


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """All of them in one folder."""
  folder = tmp_path_factory.mktemp('lra')
  lra_data.write(folder)
  return folder


@pytest.fixture(autouse=True)
def _settings(data_dir, monkeypatch):
  for _, macro, _ in TASKS.values():
    monkeypatch.delenv(macro, raising=False)
  monkeypatch.setenv('TVQ_DATA_DIR', str(data_dir))
  # A tenth of what there is.
  splits = {'train': 'train[:5]', 'validation': 'train[5:]', 'test': 'test'}
  monkeypatch.setattr(lra_image, '_SPLITS', splits)
  gin.clear_config()
  gin.bind_parameter('tvq_t5x.tasks.lra_text.corpus.held_out', 3)
  yield
  gin.clear_config()


def config(task, split='test', **changes):
  fields = {'split': split, 'batch_size': 2, 'shuffle': False, 'seed': 0}
  lengths = {'inputs': TASKS[task][2]}
  return datasets.DatasetConfig(task, lengths, **{**fields, **changes})


def examples(task, split):
  """The examples of a split, from its batches: their features without padding, and classes."""
  found = []
  for batch in datasets.evaluation_batches(config(task, split), converter(task)):
    for i in np.flatnonzero(batch['label_weights']):
      texts = [
        batch[f'{TOKENS}{n}'][i, : batch[f'{LENGTHS}{n}'][i]]
        for n in ('', '_2')
        if f'{TOKENS}{n}' in batch
      ]
      assert batch[TOKENS].shape == (2, TASKS[task][2])
      found.append((*texts, int(batch['label'][i])))
  return found


def read_bytes(tokens):
  return bytes((tokens - 3).astype(np.uint8))


@pytest.mark.parametrize('task', TASKS)
def test_endless_training_batches(task):
  batches = datasets.training_batches(config(task, 'train', shuffle=True), converter(task))
  labels = set()
  for _ in range(10):
    batch = next(batches)
    labels.update(batch['label'].tolist())
    assert batch['label_weights'].tolist() == [1, 1]
  assert labels == {example[-1] for example in examples(task, 'train')}


@pytest.mark.parametrize(('split', 'file'), SPLITS)
def test_listops(split, file):
  names = ['', '[MIN', '[MAX', '[MED', '[SM', ']', *map(str, range(10))]
  found = [
    (' '.join(names[i] for i in ids), label) for ids, label in examples('lra_listops', split)
  ]
  assert found == [
    (' '.join(text.replace('(', '').replace(')', '').split()), value)
    for text, value in lra_data.LISTOPS[file]
  ]


def test_line_feeds_and_the_published_folder(tmp_path, monkeypatch):
  expected = [(ids.tolist(), label) for ids, label in examples('lra_listops', 'test')]
  lra_data.listops(tmp_path / 'listops-1000', line_end='\n')
  monkeypatch.setenv('LISTOPS_PATH', str(tmp_path))
  assert [(ids.tolist(), label) for ids, label in examples('lra_listops', 'test')] == expected
  lra_data.retrieval(tmp_path / 'tsv_data')
  monkeypatch.setenv('AAN_PATH', str(tmp_path))
  assert len(examples('lra_retrieval', 'test')) == 2
  (tmp_path / 'lra_release' / 'lra_release').mkdir(parents=True)
  lra_data.pathfinder(tmp_path / 'lra_release' / 'lra_release')
  monkeypatch.setenv('PATHFINDER_PATH', str(tmp_path))
  assert len(examples('lra_pathfinder', 'test')) == 2


@pytest.mark.parametrize(('split', 'file'), AAN_SPLITS)
def test_retrieval(split, file):
  found = [
    (read_bytes(a), read_bytes(b), label) for a, b, label in examples('lra_retrieval', split)
  ]
  assert found == [
    (a.encode()[:4000], b.encode()[:4000], label) for label, a, b in lra_data.PAIRS[file]
  ]


def test_text():
  found = {
    split: [(read_bytes(tokens), label) for tokens, label in examples('lra_text', split)]
    for split in ('train', 'validation', 'test')
  }
  published = {
    split: [(text.encode()[:4096], label) for text, label in rows]
    for split, rows in lra_data.REVIEWS.items()
  }
  assert found['train'] == published['train'][:5]
  assert found['validation'] == published['train'][5:]
  assert found['test'] == published['test']
  assert classification.num_cut(seqio.get_mixture_or_task('lra_text'), 'test', 4096) == 1


def test_text_validated_as_the_arena_does():
  gin.bind_parameter('tvq_t5x.tasks.lra_text.corpus.held_out', 0)
  assert len(examples('lra_text', 'train')) == 8
  assert examples('lra_text', 'validation')[0][-1] == lra_data.REVIEWS['test'][0][1]


@pytest.mark.parametrize(
  ('split', 'images'),
  [
    ('train', lra_data.IMAGES['train'][:5]),
    ('validation', lra_data.IMAGES['train'][5:]),
    ('test', lra_data.IMAGES['test']),
  ],
)
def test_image(split, images):
  found = examples('lra_image', split)
  first = 5 if split == 'validation' else 0
  assert [label for _, label in found] == [first + i for i in range(len(images))]
  for (numbers, _), pixels in zip(found, images, strict=True):
    gray = np.floor(pixels @ [0.299, 0.587, 0.114] + 0.5 + 1e-9).reshape(-1)
    np.testing.assert_allclose(numbers, gray / 127.5 - 1, atol=1e-6)


def test_splits_of_the_images_are_the_published_ones(monkeypatch):
  monkeypatch.undo()
  assert lra_image.corpus().splits == {
    'train': 'train[:45000]',
    'validation': 'train[45000:]',
    'test': 'test',
  }
  gin.clear_config()
  assert lra_text.corpus().splits == {
    'train': 'train[:-2500]',
    'validation': 'train[-2500:]',
    'test': 'test',
  }


@pytest.mark.parametrize(('task', 'side'), [('lra_pathfinder', 32), ('lra_pathx', 128)])
def test_pathfinder(task, side):
  found = {split: examples(task, split) for split in ('train', 'validation', 'test')}
  assert [len(x) for x in found.values()] == [16, 2, 2]
  # Folder 2 before folder 10.
  for i, (numbers, label) in enumerate(example for part in found.values() for example in part):
    assert label == i % 3 % 2
    pixels = lra_data.path_image(i, side).reshape(-1)
    np.testing.assert_allclose(numbers, pixels / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize('task', TASKS)
def test_gin_files(task, data_dir, monkeypatch):
  monkeypatch.delenv('TVQ_DATA_DIR')
  gin.clear_config()
  gin.parse_config_file(f'{parsing.gin_root()}/tasks/{task}.gin')
  gin.bind_parameter(f'{TASKS[task][1]}/gin.macro.value', str(data_dir))
  gin.bind_parameter('tvq_t5x.tasks.lra_text.corpus.held_out', 3)
  lengths = gin.query_parameter('TASK_FEATURE_LENGTHS/gin.macro.value')
  assert lengths == {'inputs': TASKS[task][2]}
  assert gin.query_parameter('MIXTURE_OR_TASK_NAME/gin.macro.value') == task
  assert examples(task, 'test')


@pytest.mark.parametrize('task', TASKS)
def test_without_data(task, tmp_path, monkeypatch):
  monkeypatch.setenv(TASKS[task][1], str(tmp_path))
  with pytest.raises(ConfigError, match=f'{TASKS[task][1]}.* or --data_dir') as e:
    datasets.check(config(task), converter(task))
  assert str(tmp_path) in str(e.value)
  if task not in ('lra_text', 'lra_image'):  # TFDS has a folder of its own.
    monkeypatch.delenv(TASKS[task][1])
    monkeypatch.delenv('TVQ_DATA_DIR')
    with pytest.raises(ConfigError, match=f'{TASKS[task][1]} is not set'):
      datasets.check(config(task), converter(task))


HEADER = b'Source\tTarget\r\n'


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (b'', r"begin with the line 'Source\\tTarget', and begins with 'nothing'"),
    (b'Target\tSource\r\n5\t5\r\n', r"begins with 'Target\\tSource'"),
    (b'( [MAX 2 ) 9\t9\r\n', 'begins with'),
    (HEADER, "split 'test' of lra_listops is empty"),
    (HEADER + b'5\t5\r\n5\r\n', 'line 3: 1 fields .* 2: Source, Target'),
    (HEADER + b'5\t5\t5', 'line 2: 3 fields'),
    (HEADER + b'5\t10\r\n', "line 2: '10' is no class; there are 0 to 9"),
    (HEADER + b'5\t0.5\r\n', "line 2: '0.5' is no class"),
    (HEADER + b'5\tnan\r\n', "line 2: 'nan' is no class"),
    (HEADER + b'5\t\r\n', "line 2: '' is no class"),
    (HEADER + b'[MAX 2 x ]\t2\r\n', "line 2: 'x' is no symbol of ListOps; there are .MIN"),
  ],
)
def test_listops_that_are_refused(tmp_path, monkeypatch, content, words):
  (tmp_path / 'basic_test.tsv').write_bytes(content)
  monkeypatch.setenv('LISTOPS_PATH', str(tmp_path))
  with pytest.raises(ConfigError, match=words) as e:
    list(datasets.evaluation_batches(config('lra_listops'), converter('lra_listops')))
  assert str(tmp_path) in str(e.value) or 'empty' in words


@pytest.mark.parametrize(
  ('task', 'file', 'content'),
  [('lra_listops', 'basic_val.tsv', HEADER), ('lra_retrieval', 'new_aan_pairs.eval.tsv', b'')],
)
def test_an_empty_split_is_refused_before_a_run(tmp_path, monkeypatch, task, file, content):
  (tmp_path / file).write_bytes(content)
  monkeypatch.setenv(TASKS[task][1], str(tmp_path))
  with pytest.raises(ConfigError, match=f"'validation' of {task} is empty: .*{file}.* no examples"):
    datasets.check(config(task, 'validation'), converter(task))


def test_a_file_that_was_changed_is_read_anew(tmp_path, monkeypatch):
  monkeypatch.setenv('LISTOPS_PATH', str(tmp_path))
  for value in (3, 14):
    rows = b''.join(b'%d\t%d\r\n' % (i % 10, i % 10) for i in range(value))
    (tmp_path / 'basic_test.tsv').write_bytes(HEADER + rows)
    assert len(examples('lra_listops', 'test')) == value


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (b'1.0\ta\tb\ttext\n', 'line 1: 4 fields .* 5: label, id1, id2, text1, text2'),
    (b'0.0\ta\tb\tc\td\n2.0\ta\tb\tc\td\n', "line 2: '2.0' is no class; there are 0 to 1"),
  ],
)
def test_pairs_that_are_refused(tmp_path, monkeypatch, content, words):
  (tmp_path / 'new_aan_pairs.test.tsv').write_bytes(content)
  monkeypatch.setenv('AAN_PATH', str(tmp_path))
  with pytest.raises(ConfigError, match=words):
    datasets.check(config('lra_retrieval'), converter('lra_retrieval'))


@pytest.mark.parametrize(
  ('name', 'content', 'words'),
  [
    ('metadata/2.npy', b'imgs/2 sample_0.png 0\n', 'line 1: 3 fields'),
    ('metadata/2.npy', b'imgs/2 sample_0.png 0 2 1\n', "line 1: '2' is no class"),
    ('metadata/2.npy', b'imgs/2 other.png 0 1 1\n', 'other.png.* can not be read: No such file'),
    ('imgs/2/sample_0.png', b'not a PNG', 'sample_0.png.* is no PNG'),
    (
      'imgs/2/sample_0.png',
      lra_data.png(np.zeros((32, 31), np.uint8)),
      'has 32 x 31 pixels, not 32 x 32',
    ),
  ],
)
def test_paths_that_are_refused(data_dir, tmp_path, monkeypatch, name, content, words):
  shutil.copytree(data_dir / 'pathfinder32', tmp_path / 'pathfinder32')
  (tmp_path / 'pathfinder32' / 'curv_contour_length_14' / name).write_bytes(content)
  monkeypatch.setenv('PATHFINDER_PATH', str(tmp_path))
  with pytest.raises(ConfigError, match=words):
    list(
      datasets.evaluation_batches(config('lra_pathfinder', 'train'), converter('lra_pathfinder'))
    )


def test_images_of_another_shape(tmp_path, monkeypatch):
  lra_data.image(tmp_path, side=16)
  monkeypatch.setenv('CIFAR10_PATH', str(tmp_path))
  with pytest.raises(ConfigError, match=r'an image of shape \(16, 16, 3\)'):
    datasets.check(config('lra_image'), converter('lra_image'))


@pytest.mark.parametrize('held_out', [-1, 25_000, 0.5, True])
def test_what_can_not_be_held_out(held_out):
  gin.bind_parameter('tvq_t5x.tasks.lra_text.corpus.held_out', held_out)
  with pytest.raises(ConfigError, match='held_out.* from 0 to 24999'):
    datasets.check(config('lra_text'), converter('lra_text'))


def test_an_image_is_never_cut():
  cfg = datasets.DatasetConfig('lra_image', {'inputs': 512}, 'test', 2, False, 0)
  with pytest.raises(ConfigError, match=r"give \{'inputs': 1024\}"):
    datasets.check(cfg, converter('lra_image'))


def test_all_are_registered():
  assert {*TASKS} <= set(seqio.TaskRegistry.names())
  assert lra_pathfinder._SPLITS['train'] == (0, 80)
