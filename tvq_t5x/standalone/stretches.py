"""Evaluation batches whose rows go on in the next batch: a few long stretches of a split."""

from collections.abc import Iterator

import numpy as np

from tvq_t5x import datasets
from tvq_t5x.datasets import Batch, DatasetConfig
from tvq_t5x.errors import ConfigError
from tvq_t5x.indexed import IndexedTask, Tokens

_START = 1  # What stands before the first token of a stretch: EOS.


def stretch_batches(cfg: DatasetConfig) -> Iterator[Batch]:
  """Reads the split as `cfg.batch_size` stretches side by side, every token once.

  Row b of the k-th batch holds the k-th T tokens of stretch b. Stretches are equally long but the
  last one; where one ends, padding without loss weight fills up the rows.

  Args:
    cfg: what to read, known to be valid; its task is one of this package's.

  Raises:
    ConfigError: if the tokens of its task don't lie end to end.
  """
  task = datasets.task_or_mixture(cfg.mixture_or_task_name, cfg.module)
  if not isinstance(task, IndexedTask) or task.sequence_len is not None:
    raise ConfigError(
      f'--carry_state: the sequences of {task.name} are not parts of one text that goes on from '
      'each to the next; leave it out.'
    )
  tokens = task.read(cfg.split).tokens
  return _batches(tokens, cfg.batch_size, cfg.task_feature_lengths['targets'])


def _batches(tokens: Tokens, batch_size: int, length: int) -> Iterator[Batch]:
  stretch = -(-len(tokens) // batch_size)
  for first in range(0, stretch, length):
    inputs = np.zeros([batch_size, length], np.int32)
    targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
    for row in range(batch_size):
      start = row * stretch + first
      stop = min(start + length, (row + 1) * stretch)
      part = tokens[start:stop]
      targets[row, : len(part)] = part
      weights[row, : len(part)] = 1
      before = tokens[start - 1 : start] if first else [_START]
      inputs[row, : len(part)] = np.concatenate([before, part])[: len(part)]
    yield {
      'decoder_input_tokens': inputs,
      'decoder_target_tokens': targets,
      'decoder_loss_weights': weights,
    }
