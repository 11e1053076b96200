"""The standalone training run, on the devices of one machine and without T5X."""

import dataclasses

import optax
from absl import logging

from tvq_t5x.checkpoints import layout
from tvq_t5x.common import files
from tvq_t5x.common.errors import ConfigError, is_count
from tvq_t5x.data import datasets, streaming
from tvq_t5x.data.datasets import DatasetConfig
from tvq_t5x.gin_support import parsing
from tvq_t5x.standalone import reports, run_checks
from tvq_t5x.standalone.loop import Plan, TrainingLoop
from tvq_t5x.standalone.run_log import TEST, VALIDATION
from tvq_t5x.standalone.samples import SampleConfig
from tvq_t5x.training import placement, run_limits
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.partitioning import Partitioner
from tvq_t5x.training.train_state import TrainState


def train(
  *,
  model: TransformerVQModel,
  model_dir: str,
  train_dataset_cfg: DatasetConfig,
  eval_dataset_cfg: DatasetConfig,
  partitioner: Partitioner,
  total_steps: int,
  random_seed: int,
  update_len: int | None = None,
  num_microbatches: int = 1,
  learning_rate: optax.ScalarOrSchedule | None = None,
  test_split: str | None = None,
  log_period: int = 100,
  eval_period: int | None = 1000,
  sample_period: int | None = 1000,
  checkpoint_period: int | None = 1000,
  keep_checkpoints: int | None = 2,
  sample_cfg: SampleConfig | None = None,
  initial_checkpoint: str | None = None,
  dry_run: bool = False,
) -> TrainState | None:
  """Trains a model, or goes on with a training run that has been interrupted.

  A step is a parameter update; a batch of sequences of T tokens gives T / update_len of them, and
  steps and periods are multiples of that. Everything is a function of the seed and the step: a run
  that was interrupted, even while it saved, ends with the numbers of one that was not.

  Args:
    model: to train.
    model_dir: folder of everything that the run writes. If there are checkpoints, the run goes on
      from the newest.
    train_dataset_cfg: training batches.
    eval_dataset_cfg: the validation split; each evaluation reads every token once.
    partitioner: places arrays on the devices.
    total_steps: step to end after.
    random_seed: of parameters, dropout and samples.
    update_len: tokens of each sequence that an update sees; None means whole sequences.
    num_microbatches: parts of a batch that are computed one after the other.
    learning_rate: what the optimizer was given, to be logged.
    test_split: split of the validation's task to evaluate at the end.
    log_period: steps between training metrics, which are means over the steps since the last ones.
    eval_period: steps between evaluations; there is one at the end in any case.
    sample_period: steps between samples; None means none but at the end.
    checkpoint_period: steps between checkpoints; there is one before each evaluation, too.
    keep_checkpoints: how many of the latest to keep, besides that of the lowest validation loss;
      None keeps all.
    sample_cfg: which samples; None means none at all.
    initial_checkpoint: of another run, whose parameters, optimizer state and step a new run starts
      from, at its own first batch: a checkpoint's folder, or that of the run. None means scratch.
    dry_run: print configuration, parameter count and placement, and do nothing else.

  Returns:
    The last state; None for a dry run.

  Raises:
    ConfigError: for settings that can't work, before anything is compiled.
    CheckpointError: if a checkpoint can't be written, or none can be read.
    TrainingDiverged: at a loss, gradient or parameter that is not finite.
  """
  run_checks.check_one_process()
  make_converter = model.FEATURE_CONVERTER_CLS
  test_dataset_cfg = test_split and dataclasses.replace(eval_dataset_cfg, split=test_split)
  evaluated = {VALIDATION: eval_dataset_cfg, TEST: test_dataset_cfg}
  evaluated = {split: cfg for split, cfg in evaluated.items() if cfg}
  with run_checks.missing_data():
    for cfg in (train_dataset_cfg, *evaluated.values()):
      datasets.check(cfg, make_converter)
      run_limits.check_vocabulary(cfg, model)
      run_limits.updates_in_batch(_length(cfg), model.config, update_len)
    if model.carry_state:
      streaming.check(train_dataset_cfg)
    else:
      datasets.check_seed(train_dataset_cfg)
  updates = run_limits.updates_in_batch(_length(train_dataset_cfg), model.config, update_len)
  periods = {
    'log_period': log_period,
    'eval_period': eval_period,
    'sample_period': sample_period,
    'checkpoint_period': checkpoint_period,
  }
  run_limits.check_steps(updates, total_steps, **periods)
  if keep_checkpoints is not None and not is_count(keep_checkpoints):
    raise ConfigError(
      f'train.keep_checkpoints = {keep_checkpoints!r}: give a whole number of at least 1, or None '
      'to keep all.'
    )
  placement.validate(partitioner, model.config, train_dataset_cfg.batch_size, num_microbatches)
  if eval_dataset_cfg.batch_size != train_dataset_cfg.batch_size:
    placement.validate(partitioner, model.config, eval_dataset_cfg.batch_size)
  if sample_cfg:
    sample_cfg.encoded_prompt(model.output_vocabulary)
  directory = run_checks.resolve_model_dir(model_dir)
  info = placement.describe(partitioner, model, train_dataset_cfg.batch_size)
  data = datasets.identity(train_dataset_cfg, model.carry_state)
  record = run_checks.record_of(model, info, updates, random_seed, data)
  differences = run_checks.check_same_model(directory, record)
  initial = None
  if initial_checkpoint is not None and not layout.steps_in(directory):
    initial = run_checks.check_initial_checkpoint(initial_checkpoint, record, total_steps)
  if dry_run:
    print(f'{parsing.config_str()}\n{reports.state_table(info)}')
    return None
  with run_checks.locked(directory):
    for difference in differences:
      logging.warning('The checkpoints here were written with other settings: %s', difference)
    make_batches = streaming.training_batches if model.carry_state else datasets.training_batches
    batches = make_batches(train_dataset_cfg, make_converter)
    with files.replacing(directory / 'config.gin') as f:
      f.write(parsing.config_str().encode())
    plan = Plan(
      model=model,
      directory=directory,
      batches=batches,
      batch_size=train_dataset_cfg.batch_size,
      evaluated=evaluated,
      partitioner=partitioner,
      total_steps=total_steps,
      random_seed=random_seed,
      updates=updates,
      update_len=_length(train_dataset_cfg) // updates,
      num_microbatches=num_microbatches,
      learning_rate=learning_rate,
      **periods,
      keep_checkpoints=keep_checkpoints,
      sample_cfg=sample_cfg,
      initial_checkpoint=initial,
      record=record,
    )
    logging.info(
      '%s parameters on %s; writing to %s',
      f'{info.num_parameters:,}', reports.mesh(partitioner.mesh), directory,
    )  # fmt: skip
    return TrainingLoop(plan).run()


def _length(cfg: DatasetConfig) -> int:
  return cfg.task_feature_lengths['targets']
