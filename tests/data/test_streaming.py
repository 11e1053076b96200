"""Training batches whose rows go on in the next batch."""

import dataclasses

import numpy as np
import pytest
import seqio
import tiny_task

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import datasets, streaming
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter

ROWS, LENGTH = 4, 36
INPUTS, TARGETS = 'decoder_input_tokens', 'decoder_target_tokens'
CFG = datasets.DatasetConfig(
  mixture_or_task_name='tiny_bytes',
  task_feature_lengths={'targets': LENGTH},
  split='test',
  batch_size=ROWS,
  shuffle=True,
  seed=0,
)
# 501 tokens in 14 sequences, the last one of 33.
EXPECTED = np.array([*np.frombuffer(tiny_task.text('test'), np.uint8).astype(int) + 3, 1])
SEQUENCES = 14


def read(batches, count):
  return [next(batches) for _ in range(count)]


@pytest.fixture(scope='module')
def batches():
  return read(streaming.training_batches(CFG, TransformerVQFeatureConverter), 2 * SEQUENCES)


def test_each_row_reads_the_whole_split_in_order(batches):
  padded = np.pad(EXPECTED, (0, SEQUENCES * LENGTH - len(EXPECTED)))
  for row, first in enumerate((0, 3, 7, 10)):
    found = np.concatenate([batch[TARGETS][row] for batch in batches])
    np.testing.assert_array_equal(found, np.tile(np.roll(padded, -first * LENGTH), 2))
    weights = np.concatenate([batch['decoder_loss_weights'][row] for batch in batches])
    np.testing.assert_array_equal(weights, found > 0)


def test_inputs_are_the_tokens_before(batches):
  for row in range(ROWS):
    inputs, targets = (
      np.concatenate([b[name][row] for b in batches]) for name in (INPUTS, TARGETS)
    )
    real = targets[1:] > 0
    # Across batches too; after the padding at the split's end, EOS comes.
    before = np.where(targets[:-1] > 0, targets[:-1], 1)
    np.testing.assert_array_equal(inputs[1:][real], before[real])
  assert [batch[INPUTS][0, 0] for batch in (batches[0], batches[SEQUENCES])] == [1, 1]
  assert batches[0][INPUTS][1, 0] == EXPECTED[3 * LENGTH - 1] != 1


def test_hosts_share_the_rows(batches):
  for host in range(2):
    dataset = streaming.training_dataset(CFG, host, 2).as_numpy_iterator()
    for expected in batches[:5]:
      np.testing.assert_array_equal(next(dataset)[TARGETS], expected[TARGETS][host::2])


def test_position_is_saved(batches, tmp_path):
  iterator = streaming.training_batches(CFG, TransformerVQFeatureConverter)
  read(iterator, 9)
  iterator.save(tmp_path)
  again = streaming.training_batches(CFG, TransformerVQFeatureConverter)
  again.restore(tmp_path)
  np.testing.assert_array_equal(next(again)[TARGETS], batches[9][TARGETS])
  shuffled = datasets.training_batches(CFG, TransformerVQFeatureConverter)
  with pytest.raises(ConfigError, match='carry_state'):
    shuffled.restore(tmp_path)


def test_more_rows_than_there_are():
  cfg = dataclasses.replace(CFG, batch_size=SEQUENCES + 1)
  with pytest.raises(ConfigError, match=rf'batch_size = 15 .* at most {SEQUENCES}'):
    streaming.training_batches(cfg, TransformerVQFeatureConverter)
  cfg = dataclasses.replace(CFG, shuffle=False, batch_size=502)
  with pytest.raises(ConfigError, match='batch_size = 502 .* at most 501'):
    streaming.evaluation_batches(cfg, TransformerVQFeatureConverter)


def test_tasks_of_no_text_are_refused():
  task = seqio.Task(
    'others',
    source=seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=['test']),
    preprocessors=[],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary())},
  )
  cfg = dataclasses.replace(CFG, mixture_or_task_name=task)
  with pytest.raises(ConfigError, match='carry_state.*others'):
    streaming.training_batches(cfg, TransformerVQFeatureConverter)
