"""Evaluation of a checkpoint on a split of its task."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

from tvq_t5x.common import errors, files
from tvq_t5x.data import classification, datasets, indexed, locations, registered, streaming
from tvq_t5x.data.datasets import Batch, DatasetConfig
from tvq_t5x.standalone import configuration, predictions, run_checks
from tvq_t5x.standalone.configuration import Configured
from tvq_t5x.standalone.evaluation import Evaluator
from tvq_t5x.training import placement, run_limits

_REPORT_SECONDS = 30


def evaluate(
  configured: Configured,
  split: str | None,
  carry_state: bool,
  predictions_file: str | None = None,
) -> dict[str, Any]:
  """Evaluates a checkpoint in one pass, every token once.

  Args:
    configured: from `configuration.configure`; gin is still configured in the same way.
    split: of the task; None means the one of the run's validation.
    carry_state: whether to read the split as long stretches, one for each row of a batch, see
      `streaming`.
    predictions_file: of a classifier's `predictions`, or None.

  Returns:
    By name, as JSON has them: what was evaluated, `seconds`, the metrics of `Evaluator`, and what
    else `Model.evaluation_report` says, such as `tokens` or `examples`.

  Raises:
    ConfigError: for settings that do not fit; nothing is compiled before.
    CheckpointError: if the checkpoint can't be read.
  """
  model, partitioner = configured.model, configured.partitioner
  classifier = None
  if predictions_file:
    classifier = predictions.classifier_of(model, f'--predictions={predictions_file}')
  cfg: DatasetConfig = configuration.setting('eval_dataset_cfg')
  cfg = dataclasses.replace(cfg, split=split or cfg.split)
  with errors.renamed('DatasetConfig.split', '--split' if split else 'DatasetConfig.split'):
    datasets.validate(cfg, model.FEATURE_CONVERTER_CLS)
  run_limits.check_vocabulary(cfg, model)
  length = cfg.task_feature_lengths[model.LENGTH_FEATURE]
  updates = run_limits.updates_in_batch(length, model.config, configuration.setting('update_len'))
  segment_len = configuration.setting('segment_len')
  run_limits.check_segment_len(segment_len, length, updates, model.config)
  if not carry_state:
    placement.validate(partitioner, model.config, cfg.batch_size)
  else:
    streaming.check(cfg, '--carry_state')
  with run_checks.missing_data():
    datasets.check(cfg, model.FEATURE_CONVERTER_CLS)
  locations.check_data_dir()
  loaded = configured.restore()
  # Last, as this may write a token cache, which takes hours.
  read = streaming.evaluation_batches if carry_state else datasets.evaluation_batches
  batches = read(cfg, model.FEATURE_CONVERTER_CLS)
  if carry_state:
    # There may be fewer stretches than devices.
    partitioner = partitioner.for_batch(cfg.batch_size)
  evaluator = Evaluator(
    model, partitioner, loaded.params_shardings, segment_len or length // updates, carry_state
  )
  start = time.monotonic()
  with contextlib.ExitStack() as stack:
    if predictions_file and classifier:
      file = stack.enter_context(files.replacing(predictions_file))
      how = partitioner, loaded.params, loaded.params_shardings
      batches = predictions.written(batches, file, classifier, *how)
    sums = evaluator.sums(loaded.params, _reported(batches))
  assert sums is not None  # Nothing stops it.
  seconds = time.monotonic() - start
  values = sums.ratios()
  task = registered.task_or_mixture(cfg.mixture_or_task_name, cfg.module)
  counts = indexed.counts(task, cfg.split)
  num_cut = classification.num_cut(task, cfg.split, length)
  return {
    'task': task.name,
    'split': cfg.split,
    'checkpoint': str(loaded.checkpoint),
    'step': loaded.step,
    'sequence_len': length,
    'batch_size': cfg.batch_size,
    'carry_state': carry_state,
    'seconds': seconds,
    **model.evaluation_report(values, sums.count),
    **({} if num_cut is None else {'examples_cut': num_cut}),
    **(counts.word_metrics(values['cross_entropy']) if counts else {}),
  }


def _reported(batches: Iterable[Batch]) -> Iterator[Batch]:
  """The batches, with a line in the log now and then."""
  rows, reported = 0, time.monotonic()
  for batch in batches:
    yield batch
    rows += len(next(iter(batch.values())))
    if time.monotonic() - reported > _REPORT_SECONDS:
      reported = time.monotonic()
      logging.info('%s sequences evaluated.', f'{rows:,}')
