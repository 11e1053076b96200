"""The training step as it is compiled: for the devices at hand, or for others to plan a run on."""

import functools
from typing import Any

import jax

from tvq_t5x.training import placement
from tvq_t5x.training.base_model import Batch, Model
from tvq_t5x.training.partitioning import Partitioner
from tvq_t5x.training.train_state import TrainState, init_train_state
from tvq_t5x.training.train_step import train_on_sequences


def lower_train_step(
  model: Model,
  partitioner: Partitioner,
  batch_size: int,
  length: int,
  update_len: int,
  num_microbatches: int = 1,
  segment_len: int | None = None,
) -> jax.stages.Lowered:
  """Lowers `train_on_sequences` for a batch, compiling nothing.

  Args:
    model: to train.
    partitioner: places state and batch on its devices, which need not be there.
    batch_size: B, sequences of a batch.
    length: T, tokens of a sequence.
    update_len: tokens of each sequence that an update sees.
    num_microbatches: parts of a batch that are computed one after the other.
    segment_len: tokens of each sequence that are held at once; None means update_len.

  Returns:
    The function of the train state, whose memory the new one takes, of the batch and of the key.
  """
  shardings = placement.train_state_shardings(partitioner, model)
  init = functools.partial(init_train_state, model, batch_size=batch_size)
  state = jax.eval_shape(init, jax.random.key(0))
  batch = model.batch_spec(batch_size, length)

  def train_step(state: TrainState, batch: Batch, rng: jax.Array) -> Any:
    return train_on_sequences(
      model, state, batch, rng, update_len, num_microbatches, segment_len=segment_len
    )

  jitted = partitioner.jit(
    train_step,
    in_shardings=(shardings, partitioner.batch_sharding(), None),
    out_shardings=(shardings, partitioner.replicated()),
    donate_argnums=0,
  )
  return jitted.lower(state, batch, jax.eval_shape(lambda: jax.random.key(0)))
