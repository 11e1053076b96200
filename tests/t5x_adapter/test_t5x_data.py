"""The position of T5X's training data is that of the step, whoever saved it."""

import dataclasses

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_task
from data_util import two_sentencepiece_models
from util import small_model

pytest.importorskip('t5x.utils', reason='T5X is not installed: its training data')

from t5x import utils

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import datasets, likelihood
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter
from tvq_t5x.t5x_adapter import data, paths

BATCH_SIZE, LENGTH, UPDATES = 8, 64, 2


def _cfg(cls):
  return cls(
    mixture_or_task_name='tiny_bytes',
    task_feature_lengths={'targets': LENGTH},
    split='train',
    batch_size=BATCH_SIZE,
    shuffle=True,
    seed=3,
    use_cached=False,
    pack=False,
  )


def _iterator(folder, host=0, hosts=1):
  return data.get_dataset(
    _cfg(utils.DatasetConfig),
    host,
    hosts,
    TransformerVQFeatureConverter,
    model_dir=str(folder),
    update_len=LENGTH // UPDATES,
  )


def _runner():
  return datasets.training_batches(_cfg(datasets.DatasetConfig), TransformerVQFeatureConverter)


@pytest.fixture(scope='module')
def expected():
  """More than an epoch of the standalone runner's batches."""
  batches = _runner()
  count = 2 * tiny_task.SIZES['train'] // (BATCH_SIZE * LENGTH)
  return [next(batches)['decoder_target_tokens'] for _ in range(count)]


def _file(folder, step, host=0, hosts=1):
  """Where T5X saves a position."""
  path = folder / f'checkpoint_{step}' / 'dataset'
  path = path / f'process_{host}-of-{hosts}' if hosts > 1 else path
  path.mkdir(parents=True, exist_ok=True)
  return path / f'train_ds-{host:03}-of-{hosts:03}'


def _read(iterator, count):
  return [next(iterator)['decoder_target_tokens'] for _ in range(count)]


def _restored(folder, step, host=0, hosts=1):
  iterator = _iterator(folder, host, hosts)
  iterator.restore(str(_file(folder, step, host, hosts)))
  return iterator


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_hosts_take_turns(tmp_path, expected, hosts):
  """Row k of host h is sequence h + k * hosts of the batch that one host reads."""
  parts = [_read(_iterator(tmp_path, host, hosts), len(expected)) for host in range(hosts)]
  for k, batch in enumerate(expected):
    together = np.stack([part[k] for part in parts], axis=1).reshape(BATCH_SIZE, LENGTH)
    np.testing.assert_array_equal(together, batch)


def test_a_position_is_restored(tmp_path, expected):
  iterator = _iterator(tmp_path)
  _read(iterator, 3)
  iterator.save(str(_file(tmp_path, 3 * UPDATES)))
  again = _restored(tmp_path, 3 * UPDATES)
  np.testing.assert_array_equal(_read(again, 2), expected[3:5])
  again.save(str(_file(tmp_path, 5 * UPDATES)))
  np.testing.assert_array_equal(_read(_restored(tmp_path, 5 * UPDATES), 2), expected[5:7])


def test_the_batch_that_t5x_reads_ahead_is_not_lost(tmp_path, expected):
  iterator = _iterator(tmp_path)
  _read(iterator, 1)  # Which the step after the checkpoint will see.
  iterator.save(str(_file(tmp_path, 0)))
  np.testing.assert_array_equal(_read(_restored(tmp_path, 0), 2), expected[:2])
  np.testing.assert_array_equal(_read(iterator, 2), expected[1:3])


@pytest.mark.parametrize(('before', 'after'), [(1, 2), (2, 1), (2, 4)])
def test_other_numbers_of_hosts_go_on(tmp_path, expected, before, after):
  step = 3 * UPDATES
  for host in range(before):
    iterator = _iterator(tmp_path, host, before)
    _read(iterator, 3)
    iterator.save(str(_file(tmp_path, step, host, before)))
  for host in range(after):
    found = _read(_restored(tmp_path, step, host, after), 1)
    np.testing.assert_array_equal(found[0], expected[3][host::after])


@pytest.mark.parametrize('saved', [True, False])
def test_hosts_that_read_the_same_go_on_together(tmp_path, expected, monkeypatch, saved):
  """T5X saves and restores the position of the first of them; or the run was on other hosts."""
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  step, iterators = 3 * UPDATES, [_iterator(tmp_path, share, 2) for share in (0, 0, 1, 1)]
  for host in (0, 2):
    _read(iterators[host], 3)
    if saved:
      iterators[host].save(str(_file(tmp_path, step, host, 4)))
  if not saved:
    batches = _runner()
    batches.skip(3)
    batches.save(_file(tmp_path, step).parent)
  for share in (0, 0, 1, 1):
    found = _read(_iterator(tmp_path, share, 2), 2)
    np.testing.assert_array_equal(found, [batch[share::2] for batch in expected[3:5]])


def test_several_hosts_go_on_where_the_runner_stopped(tmp_path, expected):
  batches, step = _runner(), 4 * UPDATES
  batches.skip(4)
  batches.save(_file(tmp_path, step).parent)
  np.testing.assert_array_equal(_read(_restored(tmp_path, step, 1, 2), 1)[0], expected[4][1::2])


def test_the_position_of_another_run_does_not_count(tmp_path, expected):
  """Training from a checkpoint starts at the first batch, and its steps go on counting."""
  other, folder = tmp_path / 'other', tmp_path / 'run'
  iterator = _iterator(other)
  _read(iterator, 3)
  iterator.save(str(_file(other, 3 * UPDATES)))
  tuned = _iterator(folder)
  tuned.restore(str(_file(other, 3 * UPDATES)))
  np.testing.assert_array_equal(_read(tuned, 1), expected[:1])
  tuned.save(str(_file(folder, 3 * UPDATES)))  # Before its first step.
  _read(tuned, 1)
  tuned.save(str(_file(folder, 5 * UPDATES)))
  for step, position in ((3, 0), (5, 2)):
    again = _restored(folder, step * UPDATES)
    np.testing.assert_array_equal(_read(again, 1)[0], expected[position])
    half = _restored(folder, step * UPDATES, 0, 2)
    np.testing.assert_array_equal(_read(half, 1)[0], expected[position][::2])


@pytest.fixture
def pieces(tmp_path, monkeypatch):
  """Batches of SentencePiece's pieces, of a vocabulary of one's choice in a run's folder."""
  models = two_sentencepiece_models(tmp_path)

  def make(model, folder):
    monkeypatch.setenv('SENTENCEPIECE_MODEL', models[model])
    cfg = dataclasses.replace(_cfg(utils.DatasetConfig), mixture_or_task_name='tiny_pieces')
    return data.get_dataset(cfg, 0, 1, TransformerVQFeatureConverter, model_dir=str(folder))

  return make


def test_the_run_of_another_vocabulary_does_not_go_on(tmp_path, pieces):
  folder = tmp_path / 'run'
  iterator = pieces(0, folder)
  next(iterator)
  iterator.save(str(_file(folder, 1)))
  pieces(0, folder)
  with pytest.raises(ConfigError, match='TransformerVQModel.vocabulary is SentencePiece .* there '):
    pieces(1, folder)


def test_training_from_a_checkpoint_of_another_vocabulary_says_so(tmp_path, pieces, caplog):
  file = str(_file(tmp_path / 'other', 1))
  iterator = pieces(0, tmp_path / 'other')
  next(iterator)
  iterator.save(file)
  for model, told in ((0, False), (1, True)):
    pieces(model, tmp_path / 'run').restore(file)
    assert ('was trained with another vocabulary' in caplog.text) == told


@pytest.mark.parametrize('change', [{'batch_size': 16}, {'seed': 4}, {'shuffle': False}])
def test_a_run_with_other_batches_does_not_go_on(tmp_path, change):
  iterator = _iterator(tmp_path)
  _read(iterator, 1)
  iterator.save(str(_file(tmp_path, UPDATES)))
  cfg = dataclasses.replace(_cfg(utils.DatasetConfig), **change)
  ((name, value),) = change.items()
  with pytest.raises(ConfigError, match=f'DatasetConfig.{name} = {value}, there '):
    data.get_dataset(cfg, 0, 1, TransformerVQFeatureConverter, model_dir=str(tmp_path))


def test_a_checkpoint_of_another_vocabulary_is_not_used(tmp_path):
  iterator = _iterator(tmp_path)
  _read(iterator, 1)
  iterator.save(str(_file(tmp_path, UPDATES)))
  checkpoint = str(tmp_path / f'checkpoint_{UPDATES}')
  model = small_model()
  with pytest.raises(ConfigError, match='TransformerVQModel.vocabulary is .* there bytes'):
    paths.trained(checkpoint, model)
  model.output_vocabulary = datasets.vocabulary('tiny_bytes')
  assert paths.trained(checkpoint, model) == checkpoint


@pytest.fixture
def plain():
  """Names of a task of SeqIO's own kind, with examples longer than a sequence, and of a mixture."""
  seqio.TaskRegistry.add(
    'plain',
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
        {'targets': [b'x' * 1000, b'y' * 10]}
      ),
      splits=['train'],
    ),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=False)},
    metric_fns=[likelihood.likelihood],
  )
  seqio.MixtureRegistry.add('plain_and_tiny', ['plain', 'tiny_bytes'], default_rate=1)
  yield 'plain', 'plain_and_tiny'
  seqio.MixtureRegistry.remove('plain_and_tiny')
  seqio.TaskRegistry.remove('plain')


def test_examples_are_not_cut_off(tmp_path, plain):
  cfg = dataclasses.replace(_cfg(utils.DatasetConfig), mixture_or_task_name='plain', shuffle=False)
  iterator = data.get_dataset(cfg, 0, 1, TransformerVQFeatureConverter, model_dir=str(tmp_path))
  found = np.concatenate(_read(iterator, 3))[:17]
  assert [(found == ord(letter) + 3).sum() for letter in 'xy'] == [1000, 10]


def test_names_for_programs_that_take_names(plain):
  assert data.name_in_sequences('tiny_bytes') == 'tiny_bytes'
  for name in plain:
    for _ in range(2):
      assert data.name_in_sequences(name) == f'{name}_in_sequences'
  evaluator = seqio.Evaluator(
    'plain_in_sequences',
    TransformerVQFeatureConverter(),
    eval_split='train',
    sequence_length={'targets': LENGTH},
  )
  examples = [x for _, x in evaluator.cached_model_datasets['plain'].as_numpy_iterator()]
  assert sum((x['decoder_target_tokens'] > 0).sum() for x in examples) == 1010
