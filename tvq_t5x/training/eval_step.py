"""Metrics of sequences without training: a part of each at a time, in the memory of training."""

from typing import Any

import jax
import jax.numpy as jnp

from tvq_t5x.network.transformer import DecoderState
from tvq_t5x.training import metrics as metrics_lib
from tvq_t5x.training.models import Batch, Params, TransformerVQModel


def batch_metrics(
  model: TransformerVQModel, params: Params, batch: Batch, segment_len: int
) -> metrics_lib.Metrics:
  """Metrics of a batch of whole sequences, summed over segments with carried state."""
  state = model.init_state(len(batch['decoder_target_tokens']))
  return continued_metrics(model, params, state, batch, segment_len)[1]


def continued_metrics(
  model: TransformerVQModel, params: Params, state: DecoderState, batch: Batch, segment_len: int
) -> tuple[DecoderState, metrics_lib.Metrics]:
  """The same of sequences that continue those of `state`, and the state after them."""
  num_sequences, length = batch['decoder_target_tokens'].shape

  def split(x: jax.Array) -> jax.Array:  # [B, T] to [T / segment_len, B, segment_len]
    return x.reshape(num_sequences, length // segment_len, segment_len).swapaxes(0, 1)

  def segment(state: Any, part: Batch) -> tuple[Any, metrics_lib.Metrics]:
    _, (state, metrics) = model.segment_loss(params, part, state, None, 1.0)
    return state, metrics

  state, metrics = jax.lax.scan(segment, state, jax.tree.map(split, dict(batch)))
  return state, jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics)
