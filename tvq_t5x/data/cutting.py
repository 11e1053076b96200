"""Tasks of other kinds, whose examples may be longer than a sequence: no token of them is lost."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import seqio
import tensorflow as tf

from tvq_t5x.data.feature_converters import LOSS_WEIGHTS
from tvq_t5x.data.indexed import TaskByIndex


def cut(
  provider: seqio.Task | seqio.Mixture, other_features: bool = False
) -> seqio.Task | seqio.Mixture:
  """A task or mixture that cuts its examples into sequences, where SeqIO would keep the first.

  An example of n target tokens gives ceil(n / T) sequences, at least one, and the last may be
  short. EOS is appended to whole examples, also where the task would first trim them
  (`seqio.preprocessors.append_eos_after_trim`).

  Args:
    provider: any; it is not changed.
    other_features: whether each sequence has the other features of its example, such as the whole
      text; a buffer of sequences then holds the text of each.

  Returns:
    It, or the one that takes its place, of the same name. A `TaskByIndex` has sequences already,
    and tasks without targets, as those of classification, have none to cut.
  """
  if not isinstance(provider, seqio.Mixture):
    if isinstance(provider, TaskByIndex) or 'targets' not in provider.output_features:
      return provider
    return _cut_task(provider, other_features)
  tasks = [cut(task, other_features) for task in provider.tasks]
  if tasks == provider.tasks:
    return provider
  rates = map(provider.get_rate, provider.tasks)
  return seqio.Mixture(
    provider.name, list(zip(tasks, rates, strict=True)), sample_fn=provider._sample_fn
  )


def _cut_task(task: seqio.Task, other_features: bool) -> seqio.Task:
  found = copy.copy(task)
  found.preprocessors = list(map(_untrimmed, task.preprocessors))
  # Where SeqIO trims: before it shuffles.
  trim: Any = functools.partial(_cut_examples, other_features=other_features)
  found._trim_output_features = trim
  return found


def _untrimmed(preprocessor: Callable[..., tf.data.Dataset]) -> Callable[..., tf.data.Dataset]:
  function, given = preprocessor, {}
  while isinstance(function, functools.partial):
    function, given = function.func, {**function.keywords, **given}
  if function is seqio.preprocessors.append_eos_after_trim and 'sequence_length' not in given:
    return functools.partial(preprocessor, sequence_length=None)
  return preprocessor


def _cut_examples(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None, other_features: bool
) -> tf.data.Dataset:
  length = (sequence_length or {}).get('targets')
  if length is None:
    return dataset

  def pieces(example: dict[str, tf.Tensor]) -> tf.data.Dataset:
    others = example if other_features else {}
    laid = {name: example[name] for name in ('targets', LOSS_WEIGHTS) if name in example}
    size = tf.size(laid['targets'], tf.int64)
    starts = tf.data.Dataset.range(0, tf.maximum(size, 1), length)
    return starts.map(
      lambda start: {**others, **{name: x[start : start + length] for name, x in laid.items()}}
    )

  return dataset.flat_map(pieces)
