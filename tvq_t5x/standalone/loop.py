"""The loop of a standalone run: updates, metrics, samples, evaluations and checkpoints."""

import collections
import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from tvq_t5x.checkpoints.manager import Checkpoints
from tvq_t5x.common import machines, words
from tvq_t5x.common.errors import Stopped, TrainingDiverged
from tvq_t5x.data import datasets
from tvq_t5x.data.datasets import TrainingIterator
from tvq_t5x.standalone import curves, run_records, start
from tvq_t5x.standalone.evaluation import Evaluator, Sums
from tvq_t5x.standalone.profiling import Trace
from tvq_t5x.standalone.run_log import RunLog
from tvq_t5x.standalone.run_records import TEST, TRAIN, VALIDATION
from tvq_t5x.standalone.run_settings import RunSettings
from tvq_t5x.standalone.samples import Sampler
from tvq_t5x.standalone.signals import StopSignals
from tvq_t5x.training import compilation, placement
from tvq_t5x.training import metrics as metrics_lib
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.train_state import TrainState

# What tells first that a run has diverged.
_WATCHED = ('loss', 'gradient_norm')


class Plan(NamedTuple):
  """A run, found to be possible.

  Attributes:
    settings: of the run.
    directory: absolute path of its folder, which is there.
    batches: for training.
    initial_checkpoint: of another run, that a new run starts from.
    record: what is saved with each checkpoint.
    profile: updates to trace, see `profiling`; 0 means none.
  """

  settings: RunSettings
  directory: pathlib.Path
  batches: TrainingIterator
  initial_checkpoint: pathlib.Path | None
  record: Mapping[str, Any]
  profile: int = 0


def train(plan: Plan) -> TrainState:
  """Trains to the end; returns the last state.

  Raises:
    Stopped: after a signal, with a checkpoint.
  """
  settings, directory = plan.settings, plan.directory
  log = RunLog(directory, settings.writers)
  checkpoints = Checkpoints(directory, settings.keep_checkpoints, log.best_step)
  with StopSignals() as stop, checkpoints, log:
    return TrainingLoop(plan, stop, checkpoints, log).run()


class TrainingLoop:
  """One process's part of a run."""

  def __init__(self, plan: Plan, stop: StopSignals, checkpoints: Checkpoints, log: RunLog):
    """Makes the state, or reads it.

    Args:
      plan: of the run.
      stop: says when to end early.
      checkpoints: of the run.
      log: of the run; records after the state's step are dropped.
    """
    settings = plan.settings
    self._plan, self._settings = plan, settings
    self._stop, self._checkpoints, self._log = stop, checkpoints, log
    # As T5X splits its seed: both engines start from the same parameters and drop the same.
    init_rng, self._rng = jax.random.split(settings.key)
    shardings = placement.train_state_shardings(settings.partitioner, settings.model)
    if checkpoints.steps():
      begin = start.from_newest(settings, checkpoints, plan.batches, shardings)
    else:
      begin = start.of_a_new_run(settings, plan.initial_checkpoint, init_rng)
    self._state = begin.state
    self._step = int(begin.state.step)
    self._saved_step = self._step if begin.saved else None
    # Metrics of updates that are perhaps still being computed, by the step before them.
    self._pending: collections.deque[tuple[int, Any]] = collections.deque()
    self._window = begin.window  # Since the last training metrics.
    self._window_tokens, self._window_seconds = 0, 0.0
    self._began = self._step, time.monotonic()
    self._evaluator, self._sampler = _evaluator_and_sampler(settings, shardings.params)
    log.go_on_after(self._step)

  def run(self) -> TrainState:
    """Trains to the end; see `train`."""
    if self._at_end:
      logging.info(
        'The run in %s is finished: step %d of %d.',
        self._plan.directory, self._step, self._settings.total_steps,
      )  # fmt: skip
    train_step = None if self._at_end else self._compiled()
    self._began = self._step, time.monotonic()
    updates = self._settings.updates
    trace = Trace(self._plan.directory, self._plan.profile, self._step, updates)
    with contextlib.closing(trace):
      while True:
        if trace.is_due(self._step):
          self._read_metrics()
          trace.change(self._step)
        self._report()
        if self._stop.received or self._at_end:
          break
        with jax.profiler.StepTraceAnnotation('train', step_num=self._step):
          self._advance(train_step)
        if self._due(self._settings.checkpoint_period) or self._due(self._settings.eval_period):
          self._save()
    self._save()
    self._finish()
    return self._state

  @property
  def _at_end(self) -> bool:
    return self._step >= self._settings.total_steps

  def _due(self, period: int | None) -> bool:
    return self._at_end or bool(period and self._step % period == 0)

  def _compiled(self) -> Callable[..., Any]:
    settings, began = self._settings, time.monotonic()
    lowered = compilation.lower_train_step(
      settings.model,
      settings.partitioner,
      settings.batch_size,
      settings.length,
      settings.update_tokens,
      settings.num_microbatches,
      settings.segment_len,
    )
    train_step = lowered.compile()
    logging.info('Compiled in %s.', words.duration(time.monotonic() - began))
    return train_step

  def _advance(self, train_step: Callable[..., Any]) -> None:
    """Trains on a batch, and writes metrics if they are due."""
    settings, began = self._settings, time.monotonic()
    batch = jax.device_put(next(self._plan.batches), settings.partitioner.batch_sharding())
    self._state, metrics = train_step(self._state, batch, self._rng)
    self._pending.append((self._step, metrics))
    self._step += settings.updates
    self._window_tokens += settings.batch_size * settings.length
    # The devices always have the next batch at hand, and at most one.
    self._read_metrics(left=0 if self._due(settings.log_period) else 1)
    self._window_seconds += time.monotonic() - began
    if self._due(settings.log_period):
      self._write_metrics(self._step)

  def _read_metrics(self, left: int = 0) -> None:
    while len(self._pending) > left:
      step, metrics = self._pending.popleft()
      metrics = jax.device_get(metrics)
      for i in range(self._settings.updates):
        update = {name: jax.tree.map(lambda x, i=i: x[i], m) for name, m in metrics.items()}
        self._window.add(update)
        values = {name: np.asarray(update[name].total).item() for name in _WATCHED}
        if not all(map(math.isfinite, values.values())):
          self._diverge(step + i + 1, values)

  def _write_metrics(self, step: int) -> None:
    settings, metrics = self._settings, self._window.ratios()
    if settings.learning_rate is not None:
      rate = settings.learning_rate
      metrics['learning_rate'] = np.asarray(rate(step - 1) if callable(rate) else rate).item()
    speed = self._window_tokens / max(self._window_seconds, 1e-9)
    first_step, first_time = self._began
    total = settings.total_steps
    left = (total - step) * (time.monotonic() - first_time) / max(step - first_step, 1)
    where = (
      f'step {step}/{total} ({step / total:.0%}), {speed:,.0f} tokens/s, '
      f'{words.duration(left)} left: '
    )
    self._log.write(TRAIN, step, metrics, where, tokens=self._tokens(step), tokens_per_second=speed)
    self._window = Sums()
    self._window_tokens, self._window_seconds = 0, 0.0

  def _tokens(self, step: int) -> int:
    return step * self._settings.batch_size * self._settings.update_tokens

  def _diverge(self, step: int, values: Mapping[str, float]) -> None:
    if not self._log.record(TRAIN, step):
      self._write_metrics(step)
    found = ', '.join(f'{name} = {value:g}' for name, value in values.items())
    steps = self._checkpoints.steps()
    kept = f'checkpoints up to step {steps[-1]} are unharmed' if steps else 'there is no checkpoint'
    raise TrainingDiverged(
      f'Training diverged at step {step}: {found}. The metrics up to this step are in '
      f'{self._plan.directory / "metrics.jsonl"}; {kept}, and none was saved of this state. '
      'Try a lower learning rate, a longer warm-up, clipping (clip_norm of the '
      "optimizer) or TransformerConfig.dtype = 'float32'. The same settings would end the same way."
    )

  def _save(self) -> None:
    if self._saved_step == self._step:
      return
    self._read_metrics()
    if not _all_finite(self._state.params):
      self._diverge(self._step, {'a parameter': math.nan})
    metadata = {**self._plan.record, 'window': self._window.to_json()}
    self._checkpoints.save(self._step, self._state, self._plan.batches, metadata)
    self._saved_step = self._step

  def _report(self) -> None:
    """Writes what is due at this step, but has not been written before an interruption."""
    settings, step = self._settings, self._step
    if not step or self._stop.received:
      return
    if self._sampler and self._due(settings.sample_period) and not self._log.has_samples(step):
      self._read_metrics()
      self._log.write_samples(step, self._sampler(self._state.params, step))
    if self._due(settings.eval_period):
      if is_new := self._evaluate(VALIDATION):
        usage = metrics_lib.code_usage(self._state.params, settings.model.config)
        self._log.write_histograms(VALIDATION, step, usage)
      self._draw(VALIDATION, is_new)

  def _evaluate(self, split: str) -> bool:
    """Evaluates a split once; a signal ends it without a record. Returns whether it is new."""
    cfg = self._settings.evaluated[split]
    if self._log.record(split, self._step):
      return False
    began = time.monotonic()
    batches = datasets.evaluation_batches(cfg, self._settings.model.FEATURE_CONVERTER_CLS)
    metrics = self._evaluator(self._state.params, batches, lambda: bool(self._stop.received))
    if metrics is None:
      return False
    seconds = words.duration(time.monotonic() - began)
    where = f'{split} after step {self._step} ({seconds}): '
    self._log.write(split, self._step, metrics, where, tokens=self._tokens(self._step))
    return True

  def _draw(self, split: str, is_new: bool) -> None:
    """Writes the curve, and shows it with the split if that has just been evaluated."""
    directory, unit = self._plan.directory, self._settings.model.UNIT
    records, path = self._log.records(), directory / 'curve.png'
    picture = curves.write_curve(path, records, directory.name, unit, machines.name())
    if is_new and picture is not None:
      self._log.write_picture(split, self._step, 'curve', picture)

  def _finish(self) -> None:
    settings, step = self._settings, self._step
    self._checkpoints.wait()
    tested = self._at_end and TEST in settings.evaluated and self._evaluate(TEST)
    if self._stop.received:
      logging.warning(
        'Stopped by %s after step %d of %d, with a checkpoint. The same command continues from it.',
        self._stop.received.name, step, settings.total_steps,
      )  # fmt: skip
      raise Stopped(self._stop.received)
    self._draw(TEST, tested)
    for split in settings.evaluated:
      record = self._log.record(split, step) or {}
      logging.info('Finished, step %d, %s: %s', step, split, run_records.shortly(record))
    samples = 'samples/, ' if (self._plan.directory / 'samples').is_dir() else ''
    logging.info(
      'In %s: curve.png (and .pdf), metrics.jsonl, %stensorboard/, config.gin, checkpoints of '
      'steps %s (lowest validation loss: %s).',
      self._plan.directory, samples, self._checkpoints.steps(), self._log.best_step(),
    )  # fmt: skip


def _evaluator_and_sampler(
  settings: RunSettings, params_shardings: Any
) -> tuple[Evaluator, Sampler | None]:
  """Compile nothing yet; without a `sample_cfg`, or for a model that writes nothing, no sampler."""
  model, of, sampler = settings.model, (settings.partitioner, params_shardings), None
  if settings.sample_cfg and isinstance(model, TransformerVQModel):
    sampler = Sampler(model, *of, settings.sample_cfg, settings.key)
  return Evaluator(model, *of, settings.tokens_at_once), sampler


@jax.jit
def _all_finite(params: Any) -> jax.Array:
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
