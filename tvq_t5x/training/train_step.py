"""Parameter updates: microbatches, truncated backpropagation through a sequence, and its state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tvq_t5x.common.tokens import EOS
from tvq_t5x.network import sequence, transformer, xla
from tvq_t5x.network.transformer import DecoderState, batch_axes
from tvq_t5x.training import metrics as metrics_lib
from tvq_t5x.training.base_model import Batch, DropoutRngs, Model
from tvq_t5x.training.optimizers import codebook_labels
from tvq_t5x.training.segments import sequence_loss
from tvq_t5x.training.train_state import TrainState


def train_on_sequences(
  model: Model,
  train_state: TrainState,
  batch: Batch,
  rng: jax.Array,
  update_len: int,
  num_microbatches: int = 1,
  num_shards: int = 1,
  segment_len: int | None = None,
) -> tuple[TrainState, metrics_lib.Metrics]:
  """Trains on B sequences in T / update_len updates (truncated backpropagation).

  The window and cache are carried from one update to the next without gradient. They start empty,
  or if the train state holds those of the batch before, from these: row by row, but for rows whose
  first input is EOS, where a document begins.

  Args:
    model: defines the loss and the optimizer.
    train_state: before the updates.
    batch: sequences, [B, T] each; update_len divides T.
    rng: key of the run; masks depend on it, on the step and on the place in the global batch.
    update_len: tokens of each sequence that an update sees.
    num_microbatches: parts of the batch whose gradients are computed one after the other; divides
      B and changes no number.
    num_shards: readers of the data that took turns: the rows of the batch are those of the first,
      then those of the second, ... It changes which mask a row gets: that of its turn.
    segment_len: see `segments.sequence_loss`; divides update_len.

  Returns:
    The new state, and the metrics of each update, [T / update_len] each.
  """
  num_sequences, length = model.batch_shape(batch)
  num_updates = length // update_len
  sequence_rng = jax.random.fold_in(jax.random.fold_in(rng, 0), train_state.step)

  def split(x):  # [B, T] to [updates, microbatches, B / microbatches, update_len]
    if x.ndim == 1:  # Of whole sequences, which one update sees: to [1, microbatches, ...]
      x = x.reshape(1, num_sequences // num_microbatches, num_microbatches).swapaxes(1, 2)
      return sequence.constrain(x, (None, None, 'batch'))
    # Strided, so that every microbatch lies on all devices that share the batch.
    x = x.reshape(num_sequences // num_microbatches, num_microbatches, num_updates, update_len)
    return sequence.constrain(x.transpose(2, 1, 0, 3), (None, None, 'batch', 'length'))

  turns = jnp.arange(num_sequences).reshape(-1, num_shards).T.reshape(-1)
  example_ids = turns.reshape(-1, num_microbatches).T

  def update(carry, segment):
    train_state, states = carry
    update_rng = jax.random.fold_in(jax.random.fold_in(rng, 1), train_state.step)
    gradients, metrics, states = accumulate_gradients(
      model,
      train_state.params,
      segment,
      states,
      example_ids,
      DropoutRngs(update=update_rng, sequence=sequence_rng),
      segment_len,
    )
    return (apply_gradients(model, train_state, gradients), states), metrics

  carried = train_state.carried
  if carried is not None:
    begins = batch['decoder_input_tokens'][:, 0] == EOS
    states = _emptied(model, carried, begins)
    states = _map_rows(functools.partial(_split_rows, num_microbatches), model, states)
  elif num_updates > 1:
    initial = model.init_state(num_sequences // num_microbatches)
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_microbatches, *x.shape)), initial)
  else:  # The only update begins the sequences.
    segment = jax.tree.map(lambda x: split(x)[0], dict(batch))
    (train_state, _), metrics = update((train_state, None), segment)
    return train_state, jax.tree.map(lambda x: x[None], metrics)
  with xla.training_gradients():  # As the network is in `update`.
    states = transformer.apart(model.config, states, axis=1)
  (train_state, states), metrics = jax.lax.scan(
    update, (train_state._replace(carried=None), states), jax.tree.map(split, dict(batch))
  )
  if carried is not None:
    states = transformer.together(states, axis=1)
    train_state = train_state._replace(carried=_map_rows(_join_rows, model, states))
  return train_state, metrics


def _emptied(model: Model, state: DecoderState, rows: jax.Array) -> DecoderState:
  """The state, with that of no token in some rows [B] bool."""

  def row(empty: jax.Array, new: DecoderState, old: DecoderState) -> DecoderState:
    return jax.tree.map(functools.partial(jnp.where, empty), new, old)

  axes = batch_axes(model.config)
  return jax.vmap(row, (0, axes, axes), axes)(rows, model.init_state(len(rows)), state)


def _map_rows(function: Any, model: Model, state: DecoderState) -> DecoderState:
  """Maps the arrays of a state, each given with its batch axis."""
  return jax.tree.map(function, state, batch_axes(model.config))


def _split_rows(parts: int, x: jax.Array, axis: int) -> jax.Array:
  """[..., B, ...] to [parts, ..., B / parts, ...], strided as the batch is."""
  x = x.reshape(*x.shape[:axis], -1, parts, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis + 1, 0)


def _join_rows(x: jax.Array, axis: int) -> jax.Array:
  """The inverse of `_split_rows`."""
  x = jnp.moveaxis(x, 0, axis + 1)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def accumulate_gradients(
  model: Model,
  params: Any,
  segment: Batch,
  states: DecoderState | None,
  example_ids: jax.Array,
  rngs: DropoutRngs,
  segment_len: int | None = None,
) -> tuple[Any, metrics_lib.Metrics, DecoderState]:
  """Gradients of one update, summed over microbatches.

  Args:
    model: defines the loss.
    params: to differentiate by.
    segment: arrays [microbatches, B / microbatches, update_len].
    states: of the tokens before the segment, stacked over microbatches; None at the start of the
      sequences.
    example_ids: [microbatches, B / microbatches] int32.
    rngs: of dropout.
    segment_len: see `segments.sequence_loss`.

  Returns:
    The gradients (minus the statistics, for codebooks), the metrics and the states after the
    segment without gradient.
  """
  rows, length = model.batch_shape(jax.tree.map(lambda x: x[0], dict(segment)))
  normalizing_factor = model.normalizing_factor(rows * example_ids.shape[0], length)

  def microbatch(inputs):
    batch, state, ids = inputs
    loss_fn = functools.partial(sequence_loss, model, segment_len=segment_len)
    with xla.training_gradients():
      (loss, (after, metrics)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
        params, batch, state, rngs, normalizing_factor, ids, example_ids.size
      )
    # A token, as the cross entropy is: padding, which the gradient counts as zero, is in neither.
    num_tokens = metrics['cross_entropy'].count
    metrics['loss'] = metrics_lib.average(loss * normalizing_factor, num_tokens)
    return gradients, metrics, after

  if example_ids.shape[0] == 1:
    first = jax.tree.map(lambda x: x[0], (segment, states, example_ids))
    gradients, metrics, after = microbatch(first)
    after = jax.tree.map(lambda x: x[None], after)
  else:

    def add(total, inputs):
      gradients, metrics, state = microbatch(inputs)
      return jax.tree.map(jnp.add, total, (gradients, metrics)), state

    inputs = (segment, states, example_ids)
    shapes = jax.eval_shape(microbatch, jax.tree.map(lambda x: x[0], inputs))[:2]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (gradients, metrics), after = jax.lax.scan(add, zeros, inputs)
  metrics['gradient_norm'] = metrics_lib.average(_main_norm(gradients), 1.0)
  return gradients, metrics, after


@jax.named_scope('optimizer')
def apply_gradients(model: Model, train_state: TrainState, gradients: Any) -> TrainState:
  """One parameter update."""
  updates, opt_state = model.optimizer.update(gradients, train_state.opt_state, train_state.params)
  params = optax.apply_updates(train_state.params, updates)
  return train_state._replace(step=train_state.step + 1, params=params, opt_state=opt_state)


@jax.named_scope('optimizer')
def _main_norm(gradients: Any) -> jax.Array:
  """Global norm of the gradients of all parameters but the codebooks."""
  labels = codebook_labels(gradients)
  main = jax.tree.map(lambda g, label: g if label == 'main' else None, gradients, labels)
  return optax.tree.norm(main)
