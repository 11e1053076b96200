"""WRITERS in T5X: what its trainer measures, for CSV, Weights & Biases or a user's writer."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from clu import metric_writers

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.training import writers


class MoreWriters:
  """Writes the metrics of the first process, from the thread that trains."""

  def __init__(self, given: Sequence[Any], model_dir: str | None, last_step: int):
    """Makes the writers.

    Args:
      given: of WRITERS, as `writers.check` accepts.
      model_dir: of the run.
      last_step: that the run goes on after.

    Raises:
      ConfigError: for a MODEL_DIR in a bucket.
    """
    if given and (not model_dir or '://' in model_dir):
      raise ConfigError(
        'checked_trainer.writers', given, '(): these writers want a MODEL_DIR on a disk'
      )
    here = given if jax.process_index() == 0 else ()
    self._writer = writers.make(here, pathlib.Path(model_dir or '.'), last_step)
    # Metrics of training that are perhaps still being computed, by the step after them.
    self._pending: collections.deque[tuple[int, Any]] = collections.deque()
    self._none = not here

  def trained(self, step: int, future: Any) -> None:
    """Takes the metrics up to a step, of which T5X has given a future, and writes those before."""
    self._write_pending()
    if not self._none:
      self._pending.append((step, future))

  def evaluated(self, step: int, by_task: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the metrics of the training evaluation, as `validation/`; of several tasks apart."""
    self._write_pending()
    for task, metrics in by_task.items():
      self._write('validation' if len(by_task) == 1 else f'validation/{task}', step, metrics)

  def close(self) -> None:
    """Writes what is left."""
    self._write_pending()
    self._writer.close()

  def _write_pending(self) -> None:
    while self._pending:
      step, future = self._pending.popleft()
      self._write('train', step, future.result())

  def _write(self, where: str, step: int, metrics: Mapping[str, Any]) -> None:
    if not self._none:
      named = {f'{where}/{name}': value for name, value in metrics.items()}
      metric_writers.write_values(self._writer, step, named)
      self._writer.flush()
