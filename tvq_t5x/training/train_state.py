"""What training changes: parameters, the optimizer's state, and what sequences carry on."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import serialization, traverse_util
from flax.core import unfreeze

from tvq_t5x.network.transformer import DecoderState
from tvq_t5x.training.base_model import Model


class TrainState(NamedTuple):
  """Everything that training changes."""

  step: jax.Array  # int32 scalar, parameter updates so far.
  params: Any
  opt_state: Any
  # Of the B sequences of the last batch, if the model carries it on to the next batch.
  carried: DecoderState | None = None


def init_train_state(model: Model, rng: jax.Array, batch_size: int = 1) -> TrainState:
  """The state before the first update; its axis names are in `model.get_initial_variables`.

  Args:
    model: to train.
    rng: key of the parameters.
    batch_size: B, of a model that carries its state on.
  """
  params = model.init_params(rng)
  carried = model.init_state(batch_size) if model.carry_state else None
  return TrainState(jnp.zeros([], jnp.int32), params, model.optimizer.init(params), carried)


def to_dict(tree: Any) -> dict[str, Any]:
  """The arrays of a state as nested dicts, without what has none; see flax.serialization."""
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(serialization.to_state_dict(tree)))


def from_dict(like: Any, arrays: Mapping[str, Any]) -> Any:
  """The inverse of `to_dict`; `like` is any state with the same structure."""
  template = serialization.to_state_dict(like)
  template = traverse_util.flatten_dict(template, keep_empty_nodes=True)
  found = traverse_util.flatten_dict(unfreeze(arrays))
  return serialization.from_state_dict(like, traverse_util.unflatten_dict({**template, **found}))
