"""Tasks of the Long Range Arena and recall in T5X: it reads and trains on what the runner does."""

import numpy as np
import pytest
import seqio

pytest.importorskip('t5x.train', reason='T5X is not installed: training in it')

import gin
import lra_data
import t5x_runs
from lra_data import TASKS, converter
from t5x import utils
from t5x_runs import assert_same_arrays

from tvq_t5x.data import datasets
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter
from tvq_t5x.t5x_adapter import data, evaluation
from tvq_t5x.tasks import (  # noqa: F401
  lra_image,
  lra_listops,
  lra_pathfinder,
  lra_retrieval,
  lra_text,
  recall,
)

STEPS = 2
RECALL = 'recall_128_4'
SMALL = {
  'num_layers': 1,
  'emb_dim': 8,
  'key_dim': 4,
  'value_dim': 8,
  'mlp_dim': 8,
  'num_codes': 4,
  'block_len': 32,
  'window_len': 32,
  'scan_layers': False,
  'remat': "'none'",
}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('lra')
  lra_data.write(folder)
  return folder


@pytest.fixture(autouse=True)
def _settings(data_dir, monkeypatch):
  monkeypatch.setenv('TVQ_DATA_DIR', str(data_dir))
  splits = {'train': 'train[:5]', 'validation': 'train[5:]', 'test': 'test'}
  monkeypatch.setattr(lra_image, '_SPLITS', splits)
  gin.clear_config()
  gin.bind_parameter('tvq_t5x.tasks.lra_text.corpus.held_out', 3)
  gin.bind_parameter('tvq_t5x.tasks.recall.data.num_train', 9)
  gin.bind_parameter('tvq_t5x.tasks.recall.data.num_eval', 5)


@pytest.mark.parametrize('task', [*TASKS, RECALL])
def test_batches_are_those_of_the_runner(task, tmp_path):
  convert = TransformerVQFeatureConverter if task == RECALL else converter(task)
  lengths = {'targets': 128} if task == RECALL else {'inputs': TASKS[task][2]}
  settings = {
    'mixture_or_task_name': task,
    'task_feature_lengths': lengths,
    'batch_size': 2,
    'shuffle': True,
    'seed': 3,
  }
  theirs = utils.DatasetConfig(**settings, split='train', pack=False)
  ours = datasets.DatasetConfig(**settings, split='train')
  found = data.get_dataset(theirs, 0, 1, convert, model_dir=str(tmp_path))
  expected = datasets.training_batches(ours, convert)
  for _ in range(3):
    _assert_same(next(found), next(expected))
  theirs.split = ours.split = 'test'
  (whole,) = evaluation.whole_split_datasets(theirs, 0, 1, 4, convert).values()
  expected = datasets.evaluation_batches(ours, convert)
  for batch in whole.as_numpy_iterator():
    _assert_same(batch, next(expected))
  assert next(expected, None) is None
  # As T5X's programs read that evaluate and infer.
  name = data.name_in_sequences(task)
  assert name == task
  lengths = lengths if task == RECALL else convert().task_lengths(lengths)
  split = seqio.get_dataset(
    name, lengths, convert(pack=False), dataset_split='test', shuffle=False, num_epochs=1
  )
  whole = seqio.get_mixture_or_task(task).get_dataset(None, split='test', shuffle=False)
  assert len(list(split)) == len(list(whole)) > 1


def _assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
  'task',
  [
    *(pytest.param(t, marks=[] if t == 'lra_retrieval' else pytest.mark.slow) for t in TASKS),
    pytest.param(RECALL, marks=pytest.mark.slow),
  ],
)
def test_updates_are_those_of_the_runner(task, tmp_path):
  root = t5x_runs.ROOT / 'gin'
  length = {'lra_image': 1024, 'lra_pathfinder': 1024, 'lra_pathx': 16384}.get(task, 64)
  settings = [f'config.TransformerConfig.{name} = {value}' for name, value in SMALL.items()]
  macros = {
    'TRAIN_STEPS': STEPS,
    'WARMUP_STEPS': 1,
    'LOG_PERIOD': 1,
    'EVAL_PERIOD': STEPS,
    'CHECKPOINT_PERIOD': STEPS,
    'BATCH_SIZE': 2,
    'NUM_MICROBATCHES': 1,
    'TASK_FEATURE_LENGTHS': {'inputs': length},
  }
  files = [str(root / f'{task}.gin')]
  if task == 'lra_text':
    settings.append('lra_text.corpus.held_out = 3')
  if task == RECALL:
    files = [t5x_runs.TINY, str(root / 'tasks' / 'recall.gin')]
    macros |= {'TASK_FEATURE_LENGTHS': {'targets': 128}, 'MIXTURE_OR_TASK_NAME': RECALL}
    macros |= {'VOCAB_SIZE': 64, 'UPDATE_LEN': None}
    settings += [f'recall.data.{k} = {v}' for k, v in [('vocab_size', 64), ('num_eval', 5)]]
  t5x_runs.train(tmp_path / 'run', *settings, files=files, **macros)
  t5x_runs.train_standalone(
    tmp_path / 'standalone', *settings, files=files, SAMPLE_PERIOD=STEPS, **macros
  )
  # Adam makes steps of a size from gradients near 0.
  assert_same_arrays(tmp_path / 'run', tmp_path / 'standalone', STEPS, tolerance=1e-3)
  losses = t5x_runs.scalars(tmp_path / 'run' / 'train')['cross_entropy']
  assert len(losses) == STEPS
