"""Metrics of sequences without training: a part of each at a time, in the memory of training."""

import jax
import jax.numpy as jnp

from tvq_t5x.network.transformer import DecoderState
from tvq_t5x.training import metrics as metrics_lib
from tvq_t5x.training.base_model import Batch, Model, Params


def batch_metrics(
  model: Model, params: Params, batch: Batch, segment_len: int
) -> metrics_lib.Metrics:
  """Metrics of a batch of whole sequences, summed over segments with carried state.

  Args:
    model: defines the metrics.
    params: of the module.
    batch: sequences, [B, T] each.
    segment_len: tokens of each that are processed together; divides T.
  """
  return continued_metrics(model, params, None, batch, segment_len)[1]


def continued_metrics(
  model: Model,
  params: Params,
  state: DecoderState | None,
  batch: Batch,
  segment_len: int,
) -> tuple[DecoderState | None, metrics_lib.Metrics]:
  """Metrics of a batch of sequences that continue others, summed over segments.

  Args:
    model: defines the metrics.
    params: of the module.
    state: of the tokens before; None at the start of the sequences.
    batch: sequences, [B, T] each.
    segment_len: tokens of each that are processed together; divides T.

  Returns:
    The state after them, and the metrics.
  """
  num_sequences, length = model.batch_shape(batch)

  def segment(
    state: DecoderState | None, part: Batch
  ) -> tuple[DecoderState | None, metrics_lib.Metrics]:
    _, (after, metrics) = model.segment_loss(params, part, state, None, 1.0)
    return after, metrics

  if segment_len == length:
    return segment(state, batch)
  if state is None:
    state = model.init_state(num_sequences)

  def split(x: jax.Array) -> jax.Array:  # [B, T] to [T / segment_len, B, segment_len]
    return x.reshape(num_sequences, length // segment_len, segment_len).swapaxes(0, 1)

  state, metrics = jax.lax.scan(segment, state, jax.tree.map(split, dict(batch)))
  return state, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
