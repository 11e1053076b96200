"""A trace of some updates of a run, for TensorBoard or Perfetto."""

import pathlib
from importlib import metadata

import jax
from absl import logging
from packaging.requirements import Requirement

from tvq_t5x.common.errors import ConfigError, is_count
from tvq_t5x.standalone.run_settings import RunSettings

# Batches before the trace, as the first ones wait for data and memory.
_SKIPPED = 2
_FOLDER = 'profile'


def check(steps: int, settings: RunSettings, done: int) -> None:
  """Refuses a trace that could not be made.

  Args:
    steps: updates to trace.
    settings: of the run.
    done: updates that the run has behind it.

  Raises:
    ConfigError: naming what is accepted.
  """
  if not is_count(steps):
    raise ConfigError('--profile', steps, 'a whole number of updates, at least 1')
  updates = settings.updates
  if steps % updates:
    raise ConfigError('--profile', steps, f'a multiple of {updates}, the updates of a batch')
  most = settings.total_steps - done - _SKIPPED * updates
  if steps > most:
    left = f'of {settings.total_steps} updates {done} are done, and {_SKIPPED} batches come before'
    needed = done + steps + _SKIPPED * updates
    longer = f'it to a run with a train.total_steps of at least {needed}'
    accepted = longer if most < updates else f'at most {most}'
    raise ConfigError('--profile', steps, f'{accepted}: {left}')
  _check_libtpu()


def _check_libtpu() -> None:
  """Refuses a libtpu that does not go with JAX: its part of the profiler would end the process.

  Raises:
    ConfigError: saying what to do.
  """
  platforms = getattr(jax.config, 'jax_platforms', None)
  if platforms and 'tpu' not in platforms:
    return
  try:
    found = metadata.version('libtpu')
  except metadata.PackageNotFoundError:
    return
  named = (Requirement(text) for text in metadata.requires('jax') or ())
  wanted = next((x.specifier for x in named if x.name == 'libtpu'), None)
  if wanted and found not in wanted:
    raise ConfigError(
      f'--profile: libtpu {found} is installed, and JAX {jax.__version__} is traced with libtpu '
      f'{wanted} only. Set JAX_PLATFORMS=cpu (or cuda) in the environment, or install that one.'
    )


class Trace:
  """Traces updates after the first few of a run; does nothing for 0."""

  def __init__(self, model_dir: pathlib.Path, steps: int, begin: int, updates: int):
    """Starts nothing yet.

    Args:
      model_dir: of the run.
      steps: updates to trace.
      begin: updates so far.
      updates: of a batch.
    """
    self._folder, self._running = model_dir / _FOLDER, False
    self._first = begin + _SKIPPED * updates
    self._last = self._first + steps

  def is_due(self, step: int) -> bool:
    """Whether to `change` after so many updates, when all of them have been computed."""
    return self._first < self._last and step in (self._first, self._last)

  def change(self, step: int) -> None:
    """Starts the trace, or ends it."""
    if step == self._first:
      jax.profiler.start_trace(self._folder)
      self._running = True
    elif self._running:
      self._end()
      logging.info('Steps %d to %d are traced in %s.', self._first + 1, step, self._folder)

  def close(self) -> None:
    """Ends a trace that was not finished."""
    if self._running:
      self._end()

  def _end(self) -> None:
    self._running = False
    jax.profiler.stop_trace()
