"""Exact evaluation: one pass over a split, every token once, in the memory of training."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from tvq_t5x.network.transformer import DecoderState
from tvq_t5x.training import eval_step, placement
from tvq_t5x.training import metrics as metrics_lib
from tvq_t5x.training.base_model import Batch, Model, Params
from tvq_t5x.training.partitioning import Partitioner


class Sums:
  """Sums of clu metrics on the host in float64, for the ratios of many batches or updates."""

  def __init__(self, sums: Mapping[str, tuple[float, float]] | None = None):
    self._sums = {name: np.array(pair, np.float64) for name, pair in (sums or {}).items()}

  def add(self, metrics: metrics_lib.Metrics) -> None:
    """Adds metrics whose totals and counts are numbers."""
    for name, metric in metrics.items():
      pair = np.array([metric.total, metric.count], np.float64)
      self._sums[name] = self._sums.get(name, np.zeros(2)) + pair

  def ratios(self) -> dict[str, float]:
    """The value of each metric; NaN where nothing was counted."""
    return {
      name: float(total / count) if count else float('nan')
      for name, (total, count) in sorted(self._sums.items())
    }

  def count(self, name: str) -> int:
    """What the total of a metric is divided by: tokens of `cross_entropy`; 0 if there is none."""
    return round(float(self._sums.get(name, np.zeros(2))[1]))

  def to_json(self) -> dict[str, list[float]]:
    """The sums, from which `Sums` makes an equal object."""
    return {name: pair.tolist() for name, pair in self._sums.items()}


class Evaluator:
  """Evaluates parameters on batches, compiled once."""

  def __init__(
    self,
    model: Model,
    partitioner: Partitioner,
    params_shardings: Any,
    segment_len: int,
    carry_state: bool = False,
  ):
    """Compiles nothing yet.

    Args:
      model: defines the metrics.
      partitioner: places batches.
      params_shardings: where the parameters lie.
      segment_len: tokens of each sequence that are processed together, with the state carried
        from segment to segment; divides T. It changes memory, not numbers.
      carry_state: whether a row of a batch continues the same row of the batch before it.
    """
    self._model, self._partitioner = model, partitioner
    self._batch_sharding = partitioner.batch_sharding()
    self._state_shardings = None
    if carry_state:
      self._state_shardings = placement.decoder_state_shardings(partitioner, model.config)

    def step(
      params: Params, state: DecoderState | None, batch: Batch
    ) -> tuple[DecoderState | None, metrics_lib.Metrics]:
      after, metrics = eval_step.continued_metrics(model, params, state, batch, segment_len)
      return (after if carry_state else None), metrics

    self._step = partitioner.jit(
      step,
      in_shardings=(params_shardings, self._state_shardings, self._batch_sharding),
      out_shardings=(self._state_shardings, partitioner.replicated()),
      donate_argnums=1,
    )

  def __call__(
    self,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    should_stop: Callable[[], bool] = lambda: False,
  ) -> dict[str, float] | None:
    """The metrics over all batches.

    Args:
      params: of the model.
      batches: one pass; padding has no loss weight.
      should_stop: asked before each batch.

    Returns:
      Values by name, or None if `should_stop` said so.
    """
    sums = self.sums(params, batches, should_stop)
    return None if sums is None else sums.ratios()

  def sums(
    self,
    params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    should_stop: Callable[[], bool] = lambda: False,
  ) -> Sums | None:
    """What the metrics of `__call__` are ratios of."""
    sums, state = Sums(), None
    for batch in batches:
      if should_stop():
        return None
      if state is None and self._state_shardings is not None:
        state = self._initial_state(self._model.batch_shape(batch)[0])
      batch = jax.device_put(batch, self._batch_sharding)
      state, metrics = self._step(params, state, batch)
      sums.add(jax.device_get(metrics))
    return sums

  def _initial_state(self, batch_size: int) -> DecoderState:
    init = functools.partial(self._model.init_state, batch_size)
    return self._partitioner.jit(init, (), self._state_shardings)()
