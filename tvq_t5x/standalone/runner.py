"""The standalone training run, on the devices of one machine and without T5X."""

from absl import logging

from tvq_t5x.checkpoints import layout
from tvq_t5x.common import errors, files
from tvq_t5x.data import datasets, locations, streaming
from tvq_t5x.data.datasets import TrainingIterator
from tvq_t5x.gin_support import origins, parsing
from tvq_t5x.standalone import loop, profiling, reports, run_checks
from tvq_t5x.standalone.loop import Plan
from tvq_t5x.standalone.run_settings import RunSettings
from tvq_t5x.training import placement
from tvq_t5x.training.train_state import TrainState

# The name that gin files have for the settings of a run, as in `runner.train.total_steps = 100`.
train = RunSettings


def run(
  settings: RunSettings, dry_run: bool = False, profile: int | None = None
) -> TrainState | None:
  """Trains a model, or goes on with a training run that has been interrupted.

  Everything is a function of the seed and the step: a run that was interrupted, even while it
  saved, ends with the numbers of one that was not.

  Args:
    settings: of the run.
    dry_run: print configuration, parameter count and placement, and do nothing else.
    profile: updates to trace, into `profile/` in the run's folder; None means none.

  Returns:
    The last state; None for a dry run.

  Raises:
    ConfigError: for settings that can't work, before anything is compiled.
    CheckpointError: if a checkpoint can't be written, or none can be read.
    Stopped: after a signal, with a checkpoint.
    TrainingDiverged: at a loss, gradient or parameter that is not finite.
  """
  run_checks.check_one_process()
  _find_data(settings)
  settings.check()
  directory = run_checks.resolve_model_dir(settings.model_dir)
  info = placement.describe(settings.partitioner, settings.model, settings.batch_size)
  record = run_checks.record_of(settings, info)
  differences = run_checks.check_same_model(directory, record)
  for difference in differences:
    logging.warning(
      'The checkpoints here were written with other settings: %s', origins.with_origins(difference)
    )
  last = max(layout.steps_in(directory), default=0)
  if last > settings.total_steps:
    raise errors.ConfigError(
      'train.total_steps',
      settings.total_steps,
      f'at least {last}, of which {directory} has a checkpoint, or another MODEL_DIR',
    )
  initial = None
  if settings.initial_checkpoint is not None and not layout.steps_in(directory):
    initial = run_checks.check_initial_checkpoint(settings, record)
  if profile is not None:
    begun = [layout.step_of(initial)] if initial else layout.steps_in(directory) or [0]
    profiling.check(profile, settings, begun[-1])
  cuts = run_checks.cuts(settings)
  if dry_run:
    counts = {cfg.split: datasets.survey(cfg) for cfg in settings.dataset_cfgs}
    tables = reports.state_table(info), reports.data_table(counts), '\n'.join(cuts)
    print('\n\n'.join([parsing.config_str().rstrip('\n'), *filter(None, tables)]))
    return None
  for text in cuts:
    logging.info('%s', text)
  with run_checks.locked(directory):
    batches = _batches(settings)
    with files.replacing(directory / 'config.gin') as f:
      f.write(parsing.config_str().encode())
    logging.info(
      '%s parameters on %s; writing to %s',
      f'{info.num_parameters:,}', reports.mesh(settings.partitioner), directory,
    )  # fmt: skip
    return loop.train(Plan(settings, directory, batches, initial, record, profile or 0))


def _find_data(settings: RunSettings) -> None:
  """Refuses data that is not there, and training batches that could not be made again."""
  make_converter = settings.model.FEATURE_CONVERTER_CLS
  train_cfg, validation_cfg, *test_cfgs = settings.dataset_cfgs
  with run_checks.missing_data():
    datasets.check(train_cfg, make_converter)
    datasets.check(validation_cfg, make_converter)
    with errors.renamed('DatasetConfig.split', 'train.test_split'):
      for cfg in test_cfgs:
        datasets.check(cfg, make_converter)
    if settings.model.carry_state:
      streaming.check(train_cfg)
    else:
      datasets.check_seed(train_cfg)
  locations.check_data_dir()


def _batches(settings: RunSettings) -> TrainingIterator:
  reader = streaming if settings.model.carry_state else datasets
  return reader.training_batches(settings.train_dataset_cfg, settings.model.FEATURE_CONVERTER_CLS)
