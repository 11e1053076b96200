import collections
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf

from tvq_t5x.common import errors
from tvq_t5x.data import datasets, vocabularies
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter
from tvq_t5x.tasks import kjv

LENGTH = 4096
SEQUENCES = 51  # Of the test split, the last of them short.
CONFIG = datasets.DatasetConfig(
  mixture_or_task_name='kjv_bytes',
  task_feature_lengths={'targets': LENGTH},
  split='test',
  batch_size=4,
  shuffle=True,
  seed=0,
  module='tvq_t5x.tasks.kjv',
)


def training(**changes):
  cfg = dataclasses.replace(CONFIG, **changes)
  return datasets.training_batches(cfg, TransformerVQFeatureConverter)


def evaluation(**changes):
  cfg = dataclasses.replace(CONFIG, **changes)
  return datasets.evaluation_batches(cfg, TransformerVQFeatureConverter)


def rows(batches, count):
  """The targets of the next `count` sequences, as bytes."""
  found = []
  while len(found) < count:
    found.extend(row.tobytes() for row in next(batches)['decoder_target_tokens'])
  return found[:count]


def assert_same(xs, ys):
  for x, y in zip(xs, ys, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def take(batches, count):
  return list(itertools.islice(batches, count))


@pytest.fixture(scope='module')
def in_order():
  return rows(evaluation(batch_size=1), SEQUENCES)


def test_training_batches_are_full_numpy_arrays():
  for batch in take(training(), 2 * SEQUENCES // 4 + 1):
    assert {name: (type(v), v.shape, v.dtype) for name, v in batch.items()} == {
      'decoder_target_tokens': (np.ndarray, (4, LENGTH), np.int32),
      'decoder_input_tokens': (np.ndarray, (4, LENGTH), np.int32),
      'decoder_loss_weights': (np.ndarray, (4, LENGTH), np.float32),
    }


def test_an_epoch_holds_each_sequence_once(in_order):
  found = rows(training(), 3 * SEQUENCES)
  epochs = [found[i * SEQUENCES : (i + 1) * SEQUENCES] for i in range(3)]
  for epoch in epochs:
    assert collections.Counter(epoch) == collections.Counter(in_order)
  orders = [in_order, *epochs]
  assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_order_follows_from_the_seed():
  first = rows(training(seed=7), SEQUENCES)
  assert rows(training(seed=7), SEQUENCES) == first
  assert rows(training(seed=8), SEQUENCES) != first


def test_batch_size_does_not_change_the_order():
  assert rows(training(batch_size=3), 60) == rows(training(batch_size=7), 60)


def test_without_shuffling_epochs_are_in_order(in_order):
  assert rows(training(shuffle=False, seed=None), 2 * SEQUENCES) == in_order * 2


def test_mixture():
  seqio.MixtureRegistry.add('datasets_test_mixture', [('kjv_bytes', 1.0)])
  try:
    found = rows(training(mixture_or_task_name='datasets_test_mixture'), SEQUENCES)
  finally:
    seqio.MixtureRegistry.remove('datasets_test_mixture')
  assert len(set(found)) == SEQUENCES


# Before, within and after the first epoch of 51 sequences.
@pytest.mark.parametrize('steps', [0, 5, 13, 30])
@pytest.mark.parametrize('shuffle', [True, False])
def test_restore_continues_bit_exactly(tmp_path, steps, shuffle):
  batches = training(shuffle=shuffle)
  take(batches, steps)
  batches.save(tmp_path / 'position')
  expected = take(batches, 20)

  restored = training(shuffle=shuffle)
  take(restored, 2)
  restored.restore(tmp_path / 'position')
  assert_same(take(restored, 20), expected)


def test_saving_does_not_disturb_the_iterator(tmp_path):
  batches, undisturbed = training(), training()
  for step in range(20):
    batches.save(tmp_path / str(step))
    assert_same([next(batches)], [next(undisturbed)])


def test_a_saved_position_holds_no_text(tmp_path):
  batches = training(split='train')
  take(batches, 3)
  batches.save(tmp_path)
  assert sum(path.stat().st_size for path in pathlib.Path(tmp_path).iterdir()) < 10_000


def test_restore_of_nothing(tmp_path):
  with pytest.raises(errors.ConfigError, match='no saved position'):
    training().restore(tmp_path)


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('batch_size', 3),
    ('seed', 1),
    ('shuffle', False),
    ('split', 'validation'),
    ('task_feature_lengths', {'targets': 2048}),
  ],
)
def test_restore_refuses_other_settings(tmp_path, name, value):
  training().save(tmp_path)
  with pytest.raises(errors.ConfigError, match=rf'DatasetConfig\.{name} = ') as e:
    training(**{name: value}).restore(tmp_path)
  assert repr(json.loads((tmp_path / 'config.json').read_text())[name]) in str(e.value)


@pytest.mark.parametrize('batch_size', [1, 3, 7, 64])
@pytest.mark.parametrize('shuffle', [True, False])
def test_evaluation_reads_every_token_once(batch_size, shuffle):
  found = list(evaluation(batch_size=batch_size, shuffle=shuffle))
  assert len(found) == -(-SEQUENCES // batch_size)
  for batch in found:
    assert {v.shape for v in batch.values()} == {(batch_size, LENGTH)}
    np.testing.assert_array_equal(
      batch['decoder_loss_weights'], batch['decoder_target_tokens'] != 0
    )
  targets = np.concatenate([batch['decoder_target_tokens'] for batch in found]).ravel()
  weights = np.concatenate([batch['decoder_loss_weights'] for batch in found]).ravel()
  counted = targets[weights > 0]
  documents = kjv.documents('test')
  assert bytes((counted[counted > 1] - 3).astype(np.uint8)) == b''.join(documents)
  assert (counted == 1).sum() == len(documents)
  table = vocabularies.bytes_per_token(seqio.ByteVocabulary(), 259)
  assert table[targets].sum() == sum(map(len, documents))


def test_evaluation_of_no_full_batch_and_no_seed():
  (batch,) = evaluation(batch_size=SEQUENCES + 9, seed=None)
  assert not any(value[SEQUENCES:].any() for value in batch.values())


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'mixture_or_task_name': 'kjv_byte'}, ['mixture_or_task_name', 'kjv_bytes']),
    ({'mixture_or_task_name': '????'}, ['mixture_or_task_name', 'kjv_bytes']),
    ({'module': 'tvq_t5x.tasks.nothing'}, ['module', 'tvq_t5x.tasks.nothing']),
    ({'module': 'nothing.at.all'}, ['module', "'nothing'"]),
    ({'split': 'dev'}, ['split', "'dev'", 'test, train, validation']),
    ({'task_feature_lengths': {}}, ['task_feature_lengths', 'targets']),
    ({'task_feature_lengths': {'targets': 0}}, ['task_feature_lengths', 'at least 1']),
    ({'task_feature_lengths': {'targets': 64.0}}, ['task_feature_lengths', '64.0']),
    ({'task_feature_lengths': 512}, ['task_feature_lengths', '512']),
    ({'task_feature_lengths': {'targets': 8, 'inputs': 8}}, ['task_feature_lengths', 'inputs']),
    ({'batch_size': 0}, ['batch_size', 'at least 1']),
    ({'batch_size': -2}, ['batch_size', '-2']),
    ({'batch_size': True}, ['batch_size', 'True']),
    ({'batch_size': 2.0}, ['batch_size', '2.0']),
    ({'seed': 'zero'}, ['seed', 'zero']),
    ({'seed': True}, ['seed', 'True']),
    ({'seed': 2**63}, ['seed', f'from {-(2**63)} to {2**63 - 1}']),
    ({'seed': -(2**63) - 1}, ['seed', f'from {-(2**63)} to {2**63 - 1}']),
  ],
)
@pytest.mark.parametrize('batches', [training, evaluation])
def test_refusals_name_the_binding(batches, changes, words):
  name = next(iter(changes))
  with pytest.raises(errors.ConfigError, match=rf'^DatasetConfig\.{name} = ') as e:
    batches(**changes)
  assert all(word in str(e.value) for word in words)


@pytest.mark.parametrize('seed', [2**63 - 1, -(2**63)])
def test_the_first_and_the_last_seed(seed):
  assert len(set(rows(training(seed=seed), SEQUENCES))) == SEQUENCES


def test_shuffled_training_needs_a_seed():
  with pytest.raises(errors.ConfigError, match=r'^DatasetConfig\.seed = None'):
    training(seed=None)


def test_a_missing_dependency_of_the_module_is_not_taken_for_a_typing_error(tmp_path, monkeypatch):
  (tmp_path / 'tasks_of_a_user.py').write_text('import a_package_not_installed\n')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match='a_package_not_installed'):
    training(module='tasks_of_a_user')


def test_an_empty_cache_is_refused():
  task = seqio.Task(
    'datasets_test_uncached',
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: tf.data.Dataset.range(1), splits=('test',)
    ),
    preprocessors=[seqio.CacheDatasetPlaceholder()],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary())},
  )
  with pytest.raises(errors.ConfigError, match=r'^DatasetConfig\.use_cached = True'):
    training(mixture_or_task_name=task, use_cached=True)
  # A task that cannot be cached is read directly, as in T5X.
  next(training(use_cached=True))


_READ = """
import time
import numpy as np, tensorflow as tf
from tvq_t5x.data.datasets import TrainingIterator

def busy(i):
  end = time.monotonic() + 0.05
  while time.monotonic() < end:
    pass
  return i

def example(i):
  return {'i': tf.numpy_function(busy, [i], tf.int64)}

dataset = tf.data.Dataset.range(100000).map(example, num_parallel_calls=4).prefetch(5000)
batches = TrainingIterator(dataset.map(lambda x: {'i': tf.ensure_shape(x['i'], [])}), {})
next(batches)
"""


@pytest.mark.slow
def test_a_process_ends_while_batches_are_read(tmp_path):
  """Threads that run Python code are stopped before Python is."""
  script = tmp_path / 'read.py'
  script.write_text(_READ)
  for _ in range(3):
    subprocess.run([sys.executable, script], check=True, timeout=120)
