"""The settings of a run of the standalone runner."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from tvq_t5x.common.errors import A_SEED, ConfigError, is_count, is_seed
from tvq_t5x.data.datasets import DatasetConfig
from tvq_t5x.standalone.run_records import TEST, VALIDATION
from tvq_t5x.standalone.samples import SampleConfig
from tvq_t5x.training import random_keys, writers
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.settings import TrainingSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(TrainingSettings):
  """What to train, and what to write where meanwhile; gin files bind it as `runner.train`.

  There is an evaluation at the end in any case, and a checkpoint before each evaluation.

  Attributes:
    model_dir: folder of everything that the run writes. If there are checkpoints, the run goes on
      from the newest.
    random_seed: of parameters, dropout and samples.
    test_split: split of the validation's task to evaluate at the end.
    sample_period: steps between samples; None means none but at the end.
    keep_checkpoints: how many of the latest to keep, besides that of the lowest validation loss;
      None keeps all.
    sample_cfg: which samples; None means none at all. Models that write nothing have none.
    initial_checkpoint: of another run, whose parameters, optimizer state and step a new run starts
      from, at its own first batch: a checkpoint's folder, or that of the run. None means scratch.
    writers: that get the metrics besides the run's own files, see `writers`.
    ...: those of `TrainingSettings`.
  """

  model_dir: str
  random_seed: int
  test_split: str | None = None
  sample_period: int | None = 1000
  keep_checkpoints: int | None = 2
  sample_cfg: SampleConfig | None = None
  initial_checkpoint: str | None = None
  writers: Sequence[Any] = ()

  @property
  def evaluated(self) -> dict[str, DatasetConfig]:
    """What is evaluated, by the name of its records."""
    found = {VALIDATION: self.eval_dataset_cfg}
    if self.test_split:
      found[TEST] = dataclasses.replace(self.eval_dataset_cfg, split=self.test_split)
    return found

  @property
  def dataset_cfgs(self) -> tuple[DatasetConfig, ...]:
    """All that is read."""
    return self.train_dataset_cfg, *self.evaluated.values()

  @property
  def key(self) -> jax.Array:
    """The key of `random_seed`."""
    return random_keys.key_of(self.random_seed, 'train.random_seed')

  def check(self) -> None:
    """Refuses settings that do not fit together; their data is known to be there.

    Raises:
      ConfigError: naming the setting, and what it accepts.
    """
    super().check()
    if not is_seed(self.random_seed):
      raise ConfigError('train.random_seed', self.random_seed, A_SEED)
    if self.keep_checkpoints is not None and not is_count(self.keep_checkpoints):
      raise ConfigError(
        'train.keep_checkpoints',
        self.keep_checkpoints,
        'a whole number of at least 1, or None to keep all',
      )
    writers.check(self.writers)
    self.check_placement(self.partitioner)
    if self.sample_cfg and isinstance(self.model, TransformerVQModel):
      self.sample_cfg.encoded_prompt(self.model.output_vocabulary)
