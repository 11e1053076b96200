"""Where a checkpoint keeps what: the layout of T5X with Orbax, so that either engine reads both.

MODEL_DIR/checkpoint_N/
  state/     arrays: target/PARAMETER, state/step, state/param_states/...
  dataset/   position in the training data, in files of tf.data
  metadata/  of the standalone runner only: settings, checksums
"""

import pathlib
import re
from typing import Any

from flax import serialization, traverse_util

from tvq_t5x.train_step import TrainState

STATE, DATASET, METADATA = 'state', 'dataset', 'metadata'  # Items of a checkpoint.
PREFIX = 'checkpoint'


def folder(model_dir: pathlib.Path, step: int) -> pathlib.Path:
  """The checkpoint of a step."""
  return model_dir / f'{PREFIX}_{step}'


def steps_in(model_dir: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, which need not exist."""
  if not model_dir.is_dir():
    return []
  names = (re.fullmatch(rf'{PREFIX}_(\d+)', path.name) for path in model_dir.iterdir())
  return sorted(int(match[1]) for match in names if match)


def state_dict(state: TrainState) -> dict[str, Any]:
  """The arrays of a TrainState (or what stands in their place) under their names on disk."""
  return {
    'target': state.params,
    'state': {'step': state.step, 'param_states': _without_empty(_to_dict(state.opt_state))},
  }


def from_state_dict(like: TrainState, arrays: dict[str, Any]) -> TrainState:
  """The inverse of `state_dict`; `like` is any state with the same structure."""
  template = traverse_util.flatten_dict(_to_dict(like.opt_state), keep_empty_nodes=True)
  found = traverse_util.flatten_dict(arrays['state'].get('param_states', {}))
  opt_state = traverse_util.unflatten_dict({**template, **found})
  opt_state = serialization.from_state_dict(like.opt_state, opt_state)
  return TrainState(arrays['state']['step'], arrays['target'], opt_state)


def _to_dict(tree: Any) -> dict[str, Any]:
  return serialization.to_state_dict(tree)


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
  # Parts of an optimizer without arrays would be empty folders.
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(tree))
