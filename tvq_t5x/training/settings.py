"""The settings of a run that both engines have."""

import dataclasses

import optax
from absl import logging

from tvq_t5x.data.datasets import DatasetConfig
from tvq_t5x.network import sublayers
from tvq_t5x.training import placement, run_limits
from tvq_t5x.training.base_model import Model
from tvq_t5x.training.partitioning import Partitioner


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
  """What to train, on what, and in which steps.

  A step is a parameter update; a batch of sequences of T tokens gives T / update_len of them, and
  steps and periods are multiples of that.

  Attributes:
    model: to train.
    train_dataset_cfg: training batches.
    eval_dataset_cfg: the validation split; each evaluation reads every token once.
    partitioner: places arrays on the devices.
    total_steps: step to end after.
    update_len: tokens of each sequence that an update sees; None means whole sequences.
    segment_len: tokens of each sequence that are held in memory at once, by computing the
      activations of each segment again in the backward pass. It changes no number; None means all
      that an update sees. Evaluation reads sequences in the same parts.
    num_microbatches: parts of a batch that are computed one after the other.
    learning_rate: what the optimizer was given, to be logged.
    log_period: steps between training metrics, which are means over the steps since the last ones.
    eval_period: steps between evaluations.
    checkpoint_period: steps between checkpoints.
  """

  model: Model
  train_dataset_cfg: DatasetConfig
  eval_dataset_cfg: DatasetConfig
  partitioner: Partitioner
  total_steps: int
  update_len: int | None = None
  segment_len: int | None = None
  num_microbatches: int = 1
  learning_rate: optax.ScalarOrSchedule | None = None
  log_period: int = 100
  eval_period: int | None = 1000
  checkpoint_period: int | None = 1000

  @property
  def length(self) -> int:
    """T, tokens of a training sequence."""
    return self.train_dataset_cfg.task_feature_lengths[self.model.LENGTH_FEATURE]

  @property
  def batch_size(self) -> int:
    """Sequences of a training batch."""
    return self.train_dataset_cfg.batch_size

  @property
  def updates(self) -> int:
    """Steps that a batch gives."""
    return run_limits.updates_in_batch(self.length, self.model.config, self.update_len)

  @property
  def update_tokens(self) -> int:
    """Tokens of each sequence that an update sees."""
    return self.length // self.updates

  @property
  def tokens_at_once(self) -> int:
    """Tokens of each sequence that are held in memory at once."""
    return self.segment_len or self.update_tokens

  @property
  def dataset_cfgs(self) -> tuple[DatasetConfig, ...]:
    """All that is read."""
    return self.train_dataset_cfg, self.eval_dataset_cfg

  @property
  def periods(self) -> dict[str, int | None]:
    """By name, the numbers of steps between what happens again and again."""
    names = [f.name for f in dataclasses.fields(self) if f.name.endswith('_period')]
    return {name: getattr(self, name) for name in names}

  def check(self) -> None:
    """Refuses tasks and numbers of steps that do not go with the model; tells what changes nothing.

    Raises:
      ConfigError: naming the setting, and what it accepts.
    """
    for cfg in self.dataset_cfgs:
      run_limits.check_vocabulary(cfg, self.model)
      length = cfg.task_feature_lengths[self.model.LENGTH_FEATURE]
      updates = run_limits.updates_in_batch(length, self.model.config, self.update_len)
      run_limits.check_segment_len(self.segment_len, length, updates, self.model.config)
    run_limits.check_steps(self.updates, self.total_steps, **self.periods)
    config = self.model.config
    for name in sublayers.unused_settings(config):
      logging.warning(
        'TransformerConfig.%s = %s changes nothing: no sublayer of the model reads it.',
        name, getattr(config, name),
      )  # fmt: skip

  def check_placement(self, partitioner: Partitioner) -> None:
    """Refuses sizes that a mesh can't share out evenly.

    Raises:
      ConfigError: naming the setting, and what it accepts.
    """
    partitioner.validate_batch(self.eval_dataset_cfg.batch_size)
    placement.validate(partitioner, self.model.config, self.batch_size, self.num_microbatches)
    placement.validate_length(partitioner, self.model.config, self.tokens_at_once)
