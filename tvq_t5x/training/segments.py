"""The loss of long sequences in the memory of a part of them."""

import jax
import jax.numpy as jnp

from tvq_t5x.network import sequence, transformer
from tvq_t5x.network.transformer import DecoderState
from tvq_t5x.training import metrics as metrics_lib
from tvq_t5x.training.base_model import Batch, DropoutRngs, Model, Params


def sequence_loss(
  model: Model,
  params: Params,
  batch: Batch,
  state: DecoderState | None,
  rngs: DropoutRngs | None,
  normalizing_factor: float,
  example_ids: jax.Array | None = None,
  num_examples: int | None = None,
  *,
  segment_len: int | None = None,
) -> tuple[jax.Array, tuple[DecoderState | None, metrics_lib.Metrics]]:
  """`model.segment_loss` of a sequence, computed in segments.

  Values and gradients are those of the whole sequence at once. Between the segments only the state
  is kept, which is of constant size; the backward pass computes each segment again, so that it
  holds the activations of one.

  Args:
    model: defines the loss.
    params: as `segment_loss`.
    batch: sequences, [B, T] each.
    state: as `segment_loss`.
    rngs: as `segment_loss`.
    normalizing_factor: as `segment_loss`.
    example_ids: as `segment_loss`.
    num_examples: as `segment_loss`.
    segment_len: tokens of a segment, divides T; None means T.

  Returns:
    As `segment_loss`.
  """
  num_sequences, length = model.batch_shape(batch)
  of_batch = rngs, normalizing_factor, example_ids, num_examples
  if segment_len is None or segment_len == length:
    return model.segment_loss(params, batch, state, *of_batch)
  if state is None:
    state = model.init_state(num_sequences)

  @jax.checkpoint
  def segment(state: DecoderState, part: Batch):
    loss, (after, metrics) = model.segment_loss(params, part, state, *of_batch)
    return after, (loss, metrics)

  def split(x: jax.Array) -> jax.Array:  # [B, T] to [T / segment_len, B, segment_len]
    x = x.reshape(num_sequences, length // segment_len, segment_len).swapaxes(0, 1)
    return sequence.constrain(x, (None, 'batch', 'length'))

  before = transformer.apart(model.config, state)
  after, parts = jax.lax.scan(segment, before, jax.tree.map(split, dict(batch)))
  loss, metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
  if before is not state:
    after = transformer.together(after)
  return loss, (after, metrics)
