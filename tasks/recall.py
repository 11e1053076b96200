"""`recall_{length}_{pairs}`: multi-query associative recall, what was written beside a key.

Made as the Zoology benchmark makes it (Arora et al., 2023, arXiv 2312.04927, and its code). A
sequence starts with `pairs` keys, each followed by its value; both are drawn anew for each
sequence, without repetition. Then each key comes once more, in gaps that follow a power law, and
its value is to be predicted; what stands between is drawn from all keys and values. Only these
predictions have a loss weight, so that `accuracy` is the share of the values that are recalled.

    sequence      k1 v1 k2 v2 x  x  k2 v2 x  x  x  x  k1 v1 x  x
    loss weights  0  0  0  0  0  0  0  1  0  0  0  0  0  1  0  0

One thing differs from Zoology's code: there a random token stands behind a key that is asked for,
and the value only among the labels. Here the value itself does, as in text; no key comes a third
time, so that it helps no later prediction.

Sequences are computed when they are read, each from the seed of the data, its split and its number.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from tvq_t5x.common import errors
from tvq_t5x.common.tokens import EOS, FIRST_BYTE
from tvq_t5x.data import indexed, split_metrics
from tvq_t5x.data.feature_converters import LOSS_WEIGHTS
from tvq_t5x.gin_support.configurables import configurable

LENGTHS = (128, 256, 512, 1024, 2048)
PAIRS = (4, 8, 16, 32, 64)
_SPLITS = ('train', 'validation', 'test')
_FIRST = FIRST_BYTE  # Of the keys; below are padding, EOS, which sequences start from, and unknown.


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the sequences of all these tasks are drawn from.

  Attributes:
    vocab_size: ids; those from 3 on are in their lower half keys, in their upper half values.
    num_train: sequences of the training split.
    num_eval: sequences of the validation split, and of the test split.
    power: a of the power law: a gap of n places has a probability in proportion to n**(a - 1).
    seed: of the data.
  """

  vocab_size: int
  num_train: int
  num_eval: int
  power: float
  seed: int

  @property
  def num_keys(self) -> int:
    """How many keys there are; all other ids from 3 on are values."""
    return (self.vocab_size - _FIRST) // 2


@configurable
def data(
  vocab_size: int = 8192,
  num_train: int = 100_000,
  num_eval: int = 3_000,
  power: float = 0.01,
  seed: int = 0,
) -> Settings:
  """The settings of all these tasks, by default Zoology's.

  Args:
    vocab_size: see `Settings`, as all others.
    num_train: likewise.
    num_eval: likewise.
    power: likewise.
    seed: likewise.

  Raises:
    ConfigError: if one of them is not accepted.
  """
  for name, value in (('num_train', num_train), ('num_eval', num_eval)):
    if not errors.is_count(value):
      raise errors.ConfigError(f'recall.data.{name}', value, 'a whole number of at least 1')
  if not errors.is_count(vocab_size) or vocab_size < _FIRST + 2:
    raise errors.ConfigError(
      'recall.data.vocab_size', vocab_size, f'a whole number of at least {_FIRST + 2}'
    )
  if isinstance(power, bool) or not isinstance(power, int | float) or not 0 < power <= 1:
    raise errors.ConfigError('recall.data.power', power, 'a number above 0, at most 1')
  if not errors.is_seed(seed):
    raise errors.ConfigError('recall.data.seed', seed, errors.A_SEED)
  return Settings(vocab_size, num_train, num_eval, power, seed)


def sequence(
  settings: Settings, length: int, pairs: int, split: str, number: int
) -> tuple[np.ndarray, np.ndarray]:
  """A sequence and its loss weights.

  Args:
    settings: of the data.
    length: T, even.
    pairs: of a key and a value, at most T / 4.
    split: of the task.
    number: of the sequence in the split, from 0.

  Returns:
    Tokens [T] int32, and [T] float32, 1 at the values that are asked for.
  """
  rng = np.random.default_rng([settings.seed % 2**64, _SPLITS.index(split), number])
  num_keys = settings.num_keys
  keys = _FIRST + rng.choice(num_keys, pairs, replace=False)
  first_value = _FIRST + num_keys
  values = first_value + rng.choice(settings.vocab_size - first_value, pairs, replace=False)
  tokens = rng.integers(_FIRST, settings.vocab_size, length, np.int32)
  tokens[: 2 * pairs] = np.stack([keys, values], axis=1).reshape(-1)
  places = 2 * pairs + 2 * rng.choice(
    length // 2 - pairs, pairs, replace=False, p=_gaps(length // 2 - pairs, settings.power)
  )
  tokens[places], tokens[places + 1] = keys, values
  weights = np.zeros(length, np.float32)
  weights[places + 1] = 1
  return tokens, weights


@functools.lru_cache(maxsize=64)
def _gaps(size: int, power: float) -> np.ndarray:
  """Probabilities [size] of the places of a query, in pairs of tokens."""
  found = np.arange(1, size + 1) ** (power - 1)
  return found / found.sum()


class Vocabulary(seqio.PassThroughVocabulary):
  """Keys and values, as many as `data` says when it is asked."""

  def __init__(self):
    super().__init__(0, eos_id=EOS)

  @property
  def _base_vocab_size(self) -> int:
    return data().vocab_size

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Vocabulary)


class _RecallTask(indexed.TaskByIndex):
  """A task whose examples are `sequence`'s."""

  LENGTH_FEATURE = 'targets'

  def __init__(self, *args: Any, pairs: int, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._pairs = pairs

  def sequences(self, split: str) -> tuple[int, Callable[[int], tuple[np.ndarray, np.ndarray]]]:
    """How many sequences a split has, and what returns one of them.

    Raises:
      ConfigError: if there are fewer keys than pairs, or a setting is not accepted.
    """
    settings = data()
    if settings.num_keys < self._pairs:
      raise errors.ConfigError(
        'recall.data.vocab_size',
        settings.vocab_size,
        f'at least {_FIRST + 2 * self._pairs}, as sequences of {self.name} have {self._pairs} keys',
      )
    number = settings.num_train if split == 'train' else settings.num_eval
    return number, functools.partial(sequence, settings, self.sequence_len, self._pairs, split)

  def find(self, split: str) -> None:
    """See the base class."""
    self.sequences(split)

  def examples(self, split: str, length: int) -> tuple[int, Callable[[tf.Tensor], dict[str, Any]]]:
    """See the base class."""
    number, of_index = self.sequences(split)

    def example(i: tf.Tensor) -> dict[str, Any]:
      dtypes = [tf.int32, tf.float32]
      found = tf.numpy_function(lambda i: of_index(int(i)), [i], dtypes, stateful=False)
      names = 'targets', LOSS_WEIGHTS
      return {name: tf.ensure_shape(x, [length]) for name, x in zip(names, found, strict=True)}

    return number, example


def _register(length: int, pairs: int) -> None:
  name = f'recall_{length}_{pairs}'

  def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # A `TaskByIndex` shuffles.
    task: Any = seqio.TaskRegistry.get(name)
    number, example = task.examples(split, length)
    return tf.data.Dataset.range(number).map(example)

  indexed.register(
    name,
    __name__,
    source=seqio.FunctionDataSource(dataset, splits=_SPLITS),
    preprocessors=[],
    output_features={'targets': seqio.Feature(Vocabulary(), add_eos=False)},
    metric_objs=[split_metrics.Likelihood.empty()],
    task_cls=_RecallTask,
    sequence_len=length,
    pairs=pairs,
  )


for _length, _pairs in itertools.product(LENGTHS, PAIRS):
  if 4 * _pairs <= _length:
    _register(_length, _pairs)
