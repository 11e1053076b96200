"""Training in T5X is training in the standalone runner: the same numbers from the same gin file."""

import csv

import numpy as np
import pytest
import seqio

pytest.importorskip('t5x.train', reason='T5X is not installed: training in it')

import t5x_runs
from t5x_runs import assert_same_arrays

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.standalone import run_records

seqio.TaskRegistry.add(
  'ids',
  source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=['train']),
  output_features={'targets': seqio.Feature(seqio.PassThroughVocabulary(9))},
)


def assert_same_curves(folder, standalone):
  found = t5x_runs.scalars(folder / 'train')
  records = run_records.read_records(standalone / 'metrics.jsonl')
  expected = {r['step']: r for r in records if r['split'] == 'train'}
  assert sorted(expected) == list(range(2, t5x_runs.STEPS + 1, 2))
  names = expected[2].keys() - {'step', 'split', 'tokens', 'tokens_per_second'}
  assert {'loss', 'gradient_norm', 'codebook_perplexity/layer_0_1', 'learning_rate'} <= names
  for name in names:
    assert found[name].keys() == expected.keys()
    for step, record in expected.items():
      value = pytest.approx(record[name], rel=1e-5, abs=1e-7)
      assert found[name][step] == value, (name, step)


def assert_same_tables(folder, standalone):
  """What WRITERS got are the records of the standalone runner."""
  records = run_records.read_records(standalone / 'metrics.jsonl')
  for split in ('train', 'validation'):
    expected = [r for r in records if r['split'] == split]
    with (folder / f'{split}.csv').open(newline='') as f:
      rows = list(csv.DictReader(f))
    assert [int(row['step']) for row in rows] == [r['step'] for r in expected] != []
    for row, record in zip(rows, expected, strict=True):
      value = pytest.approx(record['cross_entropy'], rel=1e-5)
      assert float(row['cross_entropy']) == value


def test_numbers_are_those_of_the_standalone_runner(trained, standalone):
  """20 updates in two engines, with every dropout and two updates a batch."""
  assert_same_curves(trained, standalone)
  assert_same_arrays(trained, standalone)


def test_microbatches_change_no_number(trained, standalone, tmp_path):
  t5x_runs.train(tmp_path / 'run', NUM_MICROBATCHES=2, WRITERS=['csv'])
  assert_same_curves(tmp_path / 'run', standalone)
  assert_same_arrays(tmp_path / 'run', trained)
  assert_same_tables(tmp_path / 'run' / 'csv', standalone)


def test_the_run_exercises_what_it_is_to_prove(trained):
  before, after = (t5x_runs.arrays(trained, step) for step in (0, t5x_runs.STEPS))
  for name, x in after.items():
    if name.startswith('target/'):
      assert np.max(np.abs(x - before[name])) > 1e-4, name
  losses = t5x_runs.scalars(trained / 'train')['cross_entropy']
  assert losses[t5x_runs.STEPS] < 0.8 * losses[2]


@pytest.mark.parametrize(
  ('settings', 'parts'),
  [
    (
      ['UPDATE_LEN = 20'],
      ['train.update_len = 20 (macro UPDATE_LEN)', 'block_len = 8', '16 or 24'],
    ),
    (['UPDATE_LEN = 48'], ['train.update_len = 48', "= {'targets': 64}", '16, 32, 64']),
    (['trainer.checked_trainer.update_len = 48'], ['update_len = 48 (checked_trainer.update_len)']),
    (["TASK_FEATURE_LENGTHS = {'targets': 36}", 'UPDATE_LEN = None'], ['36', 'block_len = 8']),
    (['TRAIN_STEPS = 25'], ['TRAIN_STEPS', '25', '24 or 26']),
    (['TRAIN_STEPS_RELATIVE = 3'], ['train.relative_steps = 3', 'macro TRAIN_STEPS_R', '2 or 4']),
    (['LOG_PERIOD = 3'], ['train.log_period = 3', 'LOG_PERIOD', 'multiple of 2', '2 or 4']),
    (["WRITERS = ['cvs']"], ['checked_trainer.writers', 'macro WRITERS', "'csv', 'wandb'"]),
    (['EVAL_PERIOD = 0'], ['train.eval_period = 0', 'or None']),
    (['CHECKPOINT_PERIOD = 5'], ['train.checkpoint_period = 5', '4 or 6']),
    (
      ['BATCH_SIZE = 6'],
      ['batch_size = 6 (macro BATCH_SIZE)', 'multiple of', '4 x model axis 2 = 8 devices'],
    ),
    (
      ['train_eval/utils.DatasetConfig.batch_size = 6'],
      ['batch_size = 6 (train_eval/', 'DatasetConfig.batch_size)', 'multiple of'],
    ),
    (['NUM_MICROBATCHES = 4'], ['num_microbatches = 4 (macro NUM_MICROBATCHES)', 'one of 1, 2']),
    (['RANDOM_SEED = 4294967296'], ['random_seed = 4294967296 (macro RANDOM_SEED)', '4294967295']),
    (['RANDOM_SEED = -1'], ['random_seed = -1 (macro RANDOM_SEED)', 'from 0 to']),
    (
      ['TransformerConfig.block_len = 32', 'SEQUENCE_PARTITIONS = 2'],
      ['SEQUENCE_PARTITIONS = 2', 'segments of 32 tokens', 'give 1, or segments', 'multiple of 64'],
    ),
    (['NUM_PARTITIONS = 2', 'SEQUENCE_PARTITIONS = 2'], ['SEQUENCE_PARTITIONS = 2', 'or NUM_PART']),
    (['VOCAB_SIZE = 263'], ['TransformerConfig.vocab_size = 263', 'multiple of 2']),
    (['TransformerConfig.num_codes = 7'], ['TransformerConfig.num_codes = 7', 'NUM_PARTITIONS']),
    (['VOCAB_SIZE = 200'], ['TransformerConfig.vocab_size = 200', '259']),
    (['vocabulary.mixture_or_task_name = "ids"'], ['TransformerVQModel.vocabulary', 'tiny_bytes']),
    (["MIXTURE_OR_TASK_NAME = 'tiny_byte'"], ['tiny_byte', 'tiny_bytes']),
    (['WARMUP_STEPS = 40'], ['warmup_cosine.warmup_steps = 40', '19']),
    (['TransformerConfig.emb_dim = 15'], ['TransformerConfig.emb_dim = 15', 'even']),
    (['BATCH_SZIE = 8'], ['BATCH_SZIE', 'BATCH_SIZE']),
    (['trian/utils.DatasetConfig.split = "train"'], ['trian', 'did you mean train']),
    (["BATCH_SIZE = '8'"], ['BATCH_SIZE', 'int']),
  ],
  ids=lambda value: value[0] if value[0].isprintable() else None,
)
def test_wrong_settings_are_refused_before_anything_is_compiled(
  tmp_path, compiled, settings, parts
):
  with pytest.raises(ConfigError) as error:
    t5x_runs.train(tmp_path / 'run', *settings, shape=(4, 2))
  for part in parts:
    assert part in str(error.value)
  assert not compiled and not (tmp_path / 'run').exists()


def test_a_checkpoint_step_within_a_batch_is_refused(tmp_path):
  """T5X asks the trainer for these steps, where the settings are not looked at."""
  settings = ['utils.SaveCheckpointConfig.checkpoint_steps = [5]']
  with pytest.raises(ConfigError, match='asks for 1 steps, and a batch gives 2'):
    t5x_runs.train(tmp_path / 'run', *settings)
