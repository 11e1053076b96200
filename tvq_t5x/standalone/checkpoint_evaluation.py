"""Evaluation of a checkpoint on a split of its task."""

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

from tvq_t5x.common import errors
from tvq_t5x.data import datasets, indexed, likelihood, locations, streaming, vocabularies
from tvq_t5x.data.datasets import Batch, DatasetConfig
from tvq_t5x.standalone import configuration, run_checks
from tvq_t5x.standalone.configuration import Configured
from tvq_t5x.standalone.evaluation import Evaluator
from tvq_t5x.training import placement, run_limits

_REPORT_SECONDS = 30


def evaluate(configured: Configured, split: str | None, carry_state: bool) -> dict[str, Any]:
  """Evaluates a checkpoint in one pass, every token once.

  Args:
    configured: from `configuration.configure`; gin is still configured in the same way.
    split: of the task; None means the one of the run's validation.
    carry_state: whether to read the split as long stretches, one for each row of a batch, see
      `streaming`.

  Returns:
    By name, as JSON has them: what was evaluated, `tokens`, `bytes` of text (where the vocabulary
    says), `seconds`, `perplexity` (of tokens) and the metrics of `Evaluator`. Of images there are
    `dimensions` and `bits_per_dimension`, in place of bytes.

  Raises:
    ConfigError: for settings that do not fit; nothing is compiled before.
    CheckpointError: if the checkpoint can't be read.
  """
  model, partitioner = configured.model, configured.partitioner
  cfg: DatasetConfig = configuration.setting('eval_dataset_cfg')
  cfg = dataclasses.replace(cfg, split=split or cfg.split)
  with errors.renamed('DatasetConfig.split', '--split' if split else 'DatasetConfig.split'):
    datasets.validate(cfg, model.FEATURE_CONVERTER_CLS)
  run_limits.check_vocabulary(cfg, model)
  length = cfg.task_feature_lengths['targets']
  updates = run_limits.updates_in_batch(length, model.config, configuration.setting('update_len'))
  segment_len = configuration.setting('segment_len')
  run_limits.check_segment_len(segment_len, length // updates, model.config)
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
  sums = evaluator.sums(loaded.params, _reported(batches))
  assert sums is not None  # Nothing stops it.
  seconds = time.monotonic() - start
  values, bits, size = sums.ratios(), 'bits_per_byte', 'bytes'
  if isinstance(model.output_vocabulary, vocabularies.ImageVocabulary):
    bits, size = 'bits_per_dimension', 'dimensions'  # As the literature has it.
    values[bits] = values.pop('bits_per_byte')
  task = datasets.task_or_mixture(cfg.mixture_or_task_name, cfg.module)
  counts = indexed.counts(task, cfg.split)
  return {
    'task': task.name,
    'split': cfg.split,
    'checkpoint': str(loaded.checkpoint),
    'step': loaded.step,
    'sequence_len': length,
    'batch_size': cfg.batch_size,
    'carry_state': carry_state,
    'tokens': sums.count('cross_entropy'),
    **({size: sums.count('bits_per_byte')} if bits in values else {}),
    'seconds': seconds,
    **values,
    'perplexity': likelihood.perplexity(values['cross_entropy']),
    **(counts.word_metrics(values['cross_entropy']) if counts else {}),
  }


def _reported(batches: Iterable[Batch]) -> Iterator[Batch]:
  """The batches, with a line in the log now and then."""
  tokens, reported = 0, time.monotonic()
  for batch in batches:
    yield batch
    tokens += int(batch['decoder_loss_weights'].sum())
    if time.monotonic() - reported > _REPORT_SECONDS:
      reported = time.monotonic()
      logging.info('%s tokens evaluated.', f'{tokens:,}')
