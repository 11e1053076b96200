"""The loop of a standalone run: updates, metrics, samples, evaluations and checkpoints."""

import collections
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from tvq_t5x.checkpoints.manager import Checkpoints, initial_state
from tvq_t5x.common import words
from tvq_t5x.common.errors import TrainingDiverged
from tvq_t5x.data import datasets
from tvq_t5x.data.datasets import DatasetConfig, TrainingIterator
from tvq_t5x.standalone import reports
from tvq_t5x.standalone.evaluation import Evaluator, Sums
from tvq_t5x.standalone.run_log import LOSS, TEST, TRAIN, VALIDATION, RunLog
from tvq_t5x.standalone.samples import SampleConfig, Sampler
from tvq_t5x.standalone.signals import StopSignals
from tvq_t5x.training import compilation, placement
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.partitioning import Partitioner
from tvq_t5x.training.train_state import TrainState, init_train_state

# What tells first that a run has diverged.
_WATCHED = ('loss', 'gradient_norm')


@dataclasses.dataclass(frozen=True)
class Plan:
  """The settings of a run, found to fit together; `runner.train` explains them."""

  model: TransformerVQModel
  directory: pathlib.Path
  batches: TrainingIterator
  batch_size: int
  evaluated: Mapping[str, DatasetConfig]  # By split.
  partitioner: Partitioner
  total_steps: int
  random_seed: int
  updates: int  # That a batch gives.
  update_len: int
  num_microbatches: int
  learning_rate: optax.ScalarOrSchedule | None
  log_period: int
  eval_period: int | None
  sample_period: int | None
  checkpoint_period: int | None
  keep_checkpoints: int | None
  sample_cfg: SampleConfig | None
  initial_checkpoint: pathlib.Path | None
  record: Mapping[str, Any]  # Is saved with each checkpoint.


class TrainingLoop:
  """One process's part of a run."""

  def __init__(self, plan: Plan):
    """Compiles nothing yet."""
    self._plan = plan
    model, partitioner = plan.model, plan.partitioner
    self._shardings = placement.train_state_shardings(partitioner, model)
    params = self._shardings.params
    self._evaluator = Evaluator(model, partitioner, params, plan.update_len)
    self._sampler = None
    if plan.sample_cfg:
      self._sampler = Sampler(model, partitioner, params, plan.sample_cfg, plan.random_seed)
    # As T5X splits its seed: both engines start from the same parameters and drop the same.
    self._init_rng, self._rng = jax.random.split(jax.random.key(plan.random_seed))
    self._step = 0
    self._saved_step: int | None = None
    # Metrics of updates that are perhaps still being computed, by the step before them.
    self._pending: collections.deque[tuple[int, Any]] = collections.deque()
    self._window = Sums()  # Since the last training metrics.
    self._window_tokens, self._window_seconds = 0, 0.0

  def run(self) -> TrainState:
    """Trains to the end, or until a signal says stop; returns the last state."""
    plan = self._plan
    checkpoints = Checkpoints(plan.directory, plan.keep_checkpoints, lambda: self._log.best_step())
    with StopSignals() as self._stop, checkpoints as self._checkpoints:
      self._restore()
      with RunLog(plan.directory, self._step) as self._log:
        if self._step >= plan.total_steps:
          logging.info(
            'The run in %s is finished: step %d of %d.',
            plan.directory, self._step, plan.total_steps,
          )  # fmt: skip
        else:
          self._compile()
        self._start = self._step, time.monotonic()
        while True:
          self._report()
          if self._stop.received or self._step >= plan.total_steps:
            break
          self._advance()
          if self._due(plan.checkpoint_period) or self._due(plan.eval_period):
            self._save()
        self._save()
        self._finish()
    return self._state

  def _due(self, period: int | None) -> bool:
    return self._step >= self._plan.total_steps or bool(period and self._step % period == 0)

  def _restore(self) -> None:
    plan = self._plan
    if not self._checkpoints.steps():
      init = functools.partial(placement.init_state, plan.partitioner)
      self._state = init(plan.model, self._init_rng, plan.batch_size)
      if plan.initial_checkpoint:
        self._state = initial_state(plan.initial_checkpoint, self._state)
        self._step = int(self._state.step)
        logging.info('Starting from %s.', plan.initial_checkpoint)
      return
    init = functools.partial(init_train_state, plan.model, batch_size=plan.batch_size)
    shapes = jax.eval_shape(init, jax.random.key(0))
    abstract = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      shapes,
      self._shardings,
    )
    restored = self._checkpoints.restore(abstract, plan.batches, plan.updates)
    self._state = restored.state
    self._step = self._saved_step = int(restored.state.step)
    self._window = Sums(restored.metadata.get('window'))
    logging.info('Continuing from the checkpoint of step %d.', self._step)

  def _compile(self) -> None:
    plan, start = self._plan, time.monotonic()
    lowered = compilation.lower_train_step(
      plan.model,
      plan.partitioner,
      plan.batch_size,
      plan.update_len * plan.updates,
      plan.update_len,
      plan.num_microbatches,
    )
    self._train_step = lowered.compile()
    logging.info('Compiled in %s.', words.duration(time.monotonic() - start))

  def _advance(self) -> None:
    """Trains on a batch, and writes metrics if they are due."""
    plan, start = self._plan, time.monotonic()
    batch = jax.device_put(next(plan.batches), plan.partitioner.batch_sharding())
    self._state, metrics = self._train_step(self._state, batch, self._rng)
    self._pending.append((self._step, metrics))
    self._step += plan.updates
    self._window_tokens += plan.batch_size * plan.update_len * plan.updates
    # The devices always have the next batch at hand, and at most one.
    self._read_metrics(left=0 if self._due(plan.log_period) else 1)
    self._window_seconds += time.monotonic() - start
    if self._due(plan.log_period):
      self._write_metrics(self._step)

  def _read_metrics(self, left: int = 0) -> None:
    while len(self._pending) > left:
      step, metrics = self._pending.popleft()
      metrics = jax.device_get(metrics)
      for i in range(self._plan.updates):
        update = {name: jax.tree.map(lambda x, i=i: x[i], m) for name, m in metrics.items()}
        self._window.add(update)
        values = {name: np.asarray(update[name].total).item() for name in _WATCHED}
        if not all(map(math.isfinite, values.values())):
          self._diverge(step + i + 1, values)

  def _write_metrics(self, step: int) -> None:
    plan, metrics = self._plan, self._window.ratios()
    if plan.learning_rate is not None:
      rate = plan.learning_rate
      metrics['learning_rate'] = np.asarray(rate(step - 1) if callable(rate) else rate).item()
    speed = self._window_tokens / max(self._window_seconds, 1e-9)
    start_step, start_time = self._start
    left = (plan.total_steps - step) * (time.monotonic() - start_time) / max(step - start_step, 1)
    where = (
      f'step {step}/{plan.total_steps} ({step / plan.total_steps:.0%}), {speed:,.0f} tokens/s, '
      f'{words.duration(left)} left: '
    )
    self._log.write(TRAIN, step, metrics, where, tokens=self._tokens(step), tokens_per_second=speed)
    self._window = Sums()
    self._window_tokens, self._window_seconds = 0, 0.0

  def _tokens(self, step: int) -> int:
    return step * self._plan.batch_size * self._plan.update_len

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
    plan, step = self._plan, self._step
    if not step or self._stop.received:
      return
    if self._sampler and self._due(plan.sample_period) and not self._log.has_samples(step):
      self._read_metrics()
      self._log.write_samples(step, self._sampler(self._state.params, step))
    if self._due(plan.eval_period):
      self._evaluate(VALIDATION)
      self._draw()

  def _evaluate(self, split: str) -> None:
    """Evaluates a split once; a signal ends it without a record."""
    cfg = self._plan.evaluated[split]
    if self._log.record(split, self._step):
      return
    start = time.monotonic()
    batches = datasets.evaluation_batches(cfg, self._plan.model.FEATURE_CONVERTER_CLS)
    metrics = self._evaluator(self._state.params, batches, lambda: bool(self._stop.received))
    if metrics is not None:
      seconds = words.duration(time.monotonic() - start)
      where = f'{split} after step {self._step} ({seconds}): '
      self._log.write(split, self._step, metrics, where, tokens=self._tokens(self._step))

  def _draw(self) -> None:
    directory = self._plan.directory
    reports.write_curve(directory / 'curve.png', self._log.records(), directory.name)

  def _finish(self) -> None:
    plan, step = self._plan, self._step
    self._checkpoints.wait()
    if step >= plan.total_steps and TEST in plan.evaluated:
      self._evaluate(TEST)
    if self._stop.received:
      logging.warning(
        'Stopped by %s after step %d of %d, with a checkpoint. The same command continues from it.',
        self._stop.received, step, plan.total_steps,
      )  # fmt: skip
      return
    self._draw()
    for split in plan.evaluated:
      record = self._log.record(split, step) or {}
      metrics = {k: record[k] for k in ('bits_per_byte', LOSS, 'accuracy') if k in record}
      values = ', '.join(f'{k} {v:.4f}' for k, v in metrics.items())
      logging.info('Finished, step %d, %s: %s', step, split, values)
    logging.info(
      'In %s: curve.png, metrics.jsonl, samples/, tensorboard/, config.gin, checkpoints of steps '
      '%s (lowest validation loss: %s).',
      plan.directory, self._checkpoints.steps(), self._log.best_step(),
    )  # fmt: skip


@jax.jit
def _all_finite(params: Any) -> jax.Array:
  return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
