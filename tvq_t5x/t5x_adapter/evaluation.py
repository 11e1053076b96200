"""Evaluation data for T5X: every token once."""

from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from tvq_t5x.data import datasets
from tvq_t5x.data.datasets import FeatureConverterFactory
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter


def whole_split_datasets(
  cfg: Any,
  shard_id: int,
  num_shards: int,
  eval_steps: int | None = None,
  feature_converter_cls: FeatureConverterFactory = TransformerVQFeatureConverter,
) -> Mapping[str, tf.data.Dataset]:
  """T5X's `train_eval_get_dataset_fn`, with the same tokens on any batch size and host count.

  T5X's own repeats the split up to `eval_steps` batches and cuts it there, so that tokens count
  twice or not at all. Here the last batch is filled up with rows whose loss weights are zero. All
  hosts read the whole split and keep their rows: they make the same number of steps.

  Args:
    cfg: T5X's `DatasetConfig` or ours.
    shard_id: which of the hosts' shares to return.
    num_shards: how many there are; divides `cfg.batch_size`.
    eval_steps: has no effect; T5X's training gives it, its evaluation does not.
    feature_converter_cls: makes the feature converter, given `pack`.

  Returns:
    For each task of the mixture that has the split, batches of `batch_size / num_shards` rows.
  """
  del eval_steps
  provider = cfg.mixture_or_task_name
  if isinstance(provider, str):
    provider = seqio.get_mixture_or_task(provider)
  return {
    task.name: datasets.evaluation_dataset(cfg, task, feature_converter_cls).map(
      lambda batch: {name: x[shard_id::num_shards] for name, x in batch.items()}
    )
    for task in seqio.get_subtasks(provider)
    if cfg.split in task.splits
  }
