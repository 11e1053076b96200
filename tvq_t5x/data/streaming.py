"""Batches for models that carry their state on: a few long stretches of a split, side by side.

Row b of a batch goes on where row b of the batch before ended, as `TransformerVQModel.carry_state`
and the evaluation with `--carry_state` need it.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.common.tokens import EOS
from tvq_t5x.data import datasets, registered
from tvq_t5x.data.datasets import Batch, DatasetConfig, FeatureConverterFactory, TrainingIterator
from tvq_t5x.data.indexed import IndexedTask, Tokens

_CARRY_STATE = 'TransformerVQModel.carry_state = True'


def training_batches(
  cfg: DatasetConfig, feature_converter_cls: FeatureConverterFactory
) -> TrainingIterator:
  """Returns endless training batches in the order of the text, whose position can be saved.

  `training_dataset` says what is in a row.

  Args:
    cfg: what to read; `cfg.shuffle` and `cfg.seed` have no effect.
    feature_converter_cls: makes the feature converter, given `pack`; it says which task features
      there have to be.

  Raises:
    ConfigError: if a setting is refused, or the tokens of the task don't lie end to end.
  """
  datasets.validate(cfg, feature_converter_cls)
  return TrainingIterator(training_dataset(cfg), datasets.identity(cfg, carry_state=True))


def check(cfg: DatasetConfig, setting: str = _CARRY_STATE) -> None:
  """Refuses a task whose tokens don't lie end to end; reads nothing.

  Args:
    cfg: names the task.
    setting: that needs it, for the message.

  Raises:
    ConfigError: if they don't.
  """
  _task(cfg, setting)


def training_dataset(cfg: DatasetConfig, shard_id: int = 0, num_shards: int = 1) -> tf.data.Dataset:
  """Returns endless batches [B, T] in the order of the text, or one host's share of their rows.

  Row b starts at sequence b N / B of the split's N and goes on from each batch to the next, in the
  end with the split's first sequence. The first input of a sequence is the token before it, of the
  split's first one EOS.

  Args:
    cfg: what to read, known to be valid; T5X's class of this name has the same fields.
    shard_id: rows `shard_id`, `shard_id + num_shards`, ... are returned.
    num_shards: how many hosts there are; divides `cfg.batch_size`.

  Raises:
    ConfigError: if the tokens of the task don't lie end to end.
  """
  tokens = _task(cfg, _CARRY_STATE).read(cfg.split).tokens
  length, rows = cfg.task_feature_lengths['targets'], cfg.batch_size
  size = -(-len(tokens) // length)
  if rows > size:
    raise ConfigError(
      'DatasetConfig.batch_size', rows, f'at most {size}, the sequences of {cfg.split!r}'
    )

  def arrays(place: np.ndarray) -> tuple[np.ndarray, ...]:
    batch, row = divmod(int(place), rows)
    first = (row * size // rows + batch) % size * length
    return _features(tokens, first, first + length, length, begins=not first)

  def example(place: tf.Tensor) -> dict[str, tf.Tensor]:
    dtypes = [tf.int32, tf.int32, tf.float32]
    found = tf.numpy_function(arrays, [place], dtypes, stateful=False)
    return {name: tf.ensure_shape(x, [length]) for name, x in zip(_NAMES, found, strict=True)}

  options = tf.data.Options()
  options.experimental_symbolic_checkpoint = True
  places = tf.data.Dataset.counter(shard_id, num_shards).map(example, tf.data.AUTOTUNE)
  return places.batch(rows // num_shards, drop_remainder=True).with_options(options)


def evaluation_batches(
  cfg: DatasetConfig, feature_converter_cls: FeatureConverterFactory
) -> Iterator[Batch]:
  """Reads the split as `cfg.batch_size` stretches side by side, every token once.

  Row b of the k-th batch holds the k-th T tokens of stretch b. Stretches are equally long but the
  last one; where one ends, padding without loss weight fills up the rows. The first input of each
  stretch is EOS.

  Args:
    cfg: what to read.
    feature_converter_cls: makes the feature converter, given `pack`.

  Raises:
    ConfigError: if a setting is refused, or the tokens of the task don't lie end to end.
  """
  datasets.validate(cfg, feature_converter_cls)
  tokens = _task(cfg, '--carry_state').read(cfg.split).tokens
  if cfg.batch_size > len(tokens):
    raise ConfigError(
      'DatasetConfig.batch_size',
      cfg.batch_size,
      f'at most {len(tokens)}, the tokens of {cfg.split!r}, with --carry_state',
    )
  return _batches(tokens, cfg.batch_size, cfg.task_feature_lengths['targets'])


def _task(cfg: DatasetConfig, setting: str) -> IndexedTask:
  task = registered.task_or_mixture(cfg.mixture_or_task_name, cfg.module)
  if not isinstance(task, IndexedTask) or task.sequence_len is not None:
    raise ConfigError(
      f'{setting}: the sequences of {task.name} are not parts of one text that goes on from '
      'each to the next; leave it out.'
    )
  return task


def _batches(tokens: Tokens, batch_size: int, length: int) -> Iterator[Batch]:
  stretch = -(-len(tokens) // batch_size)
  for first in range(0, stretch, length):
    rows = []
    for start in range(0, batch_size * stretch, stretch):
      stop = min(first + length, stretch)
      rows.append(_features(tokens, start + first, start + stop, length, begins=not first))
    yield {name: np.stack(x) for name, x in zip(_NAMES, zip(*rows, strict=True), strict=True)}


_NAMES = ('decoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights')


def _features(
  tokens: Tokens, start: int, stop: int, length: int, begins: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The features of tokens `start` to `stop`, as far as there are any, padded to a length.

  Args:
    tokens: all of them.
    start: of the sequence.
    stop: of the sequence, at most `start + length`.
    length: T.
    begins: whether EOS stands before the sequence, in place of the token that does.

  Returns:
    Features [T] in the order of `_NAMES`.
  """
  inputs = np.zeros(length, np.int32)
  targets, weights = np.zeros_like(inputs), np.zeros(length, np.float32)
  part = tokens[start:stop]
  before = [EOS] if begins else tokens[start - 1 : start]
  targets[: len(part)] = part
  weights[: len(part)] = 1
  inputs[: len(part)] = np.concatenate([before, part])[: len(part)]
  return inputs, targets, weights
