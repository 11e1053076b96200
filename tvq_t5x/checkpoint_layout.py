"""Where a checkpoint keeps what: the layout of T5X with Orbax, so that either engine reads both.

MODEL_DIR/checkpoint_N/
  state/     arrays: target/PARAMETER, state/step, state/param_states/..., and where the state of
             sequences is carried on, flax_mutables/carried/...
  dataset/   position in the training data, in files of tf.data; T5X on several hosts has a folder
             process_I-of-N/ for each in it
  metadata/  of the standalone runner only: settings, checksums
"""

import pathlib
import re
from typing import Any

from etils import epath
from flax import serialization, traverse_util

from tvq_t5x.train_step import TrainState

STATE, DATASET, METADATA = 'state', 'dataset', 'metadata'  # Items of a checkpoint.
PREFIX = 'checkpoint'
# Beside a position that T5X saved: batches before it, in digits, for a start with other hosts.
BATCHES = 'batches'


def folder(model_dir: pathlib.Path, step: int) -> pathlib.Path:
  """The checkpoint of a step."""
  return model_dir / f'{PREFIX}_{step}'


def steps_in(model_dir: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, which need not exist."""
  if not model_dir.is_dir():
    return []
  names = (re.fullmatch(rf'{PREFIX}_(\d+)', path.name) for path in model_dir.iterdir())
  return sorted(int(match[1]) for match in names if match)


def batches_before(checkpoint: pathlib.Path | epath.Path, updates: int) -> int:
  """Training batches that a run has seen before a checkpoint of it.

  Args:
    checkpoint: its folder, as `folder` names it.
    updates: steps that a batch gives.
  """
  position = checkpoint / DATASET
  for path in (*position.glob(BATCHES), *position.glob(f'process_*/{BATCHES}')):
    return int(path.read_text())
  # A run of the standalone runner has them all from its own data.
  return step_of(checkpoint) // updates


def step_of(checkpoint: pathlib.Path | epath.Path) -> int:
  """The step of a checkpoint's folder, complete or being written."""
  return int(checkpoint.name.removeprefix(f'{PREFIX}_').partition('.')[0])


def state_dict(state: TrainState) -> dict[str, Any]:
  """The arrays of a TrainState (or what stands in their place) under their names on disk."""
  arrays = {
    'target': state.params,
    'state': {'step': state.step, 'param_states': _without_empty(_to_dict(state.opt_state))},
  }
  if state.carried is not None:
    arrays['flax_mutables'] = {'carried': _to_dict(state.carried)}
  return arrays


def from_state_dict(like: TrainState, arrays: dict[str, Any]) -> TrainState:
  """The inverse of `state_dict`; `like` is any state with the same structure."""
  template = traverse_util.flatten_dict(_to_dict(like.opt_state), keep_empty_nodes=True)
  found = traverse_util.flatten_dict(arrays['state'].get('param_states', {}))
  opt_state = traverse_util.unflatten_dict({**template, **found})
  opt_state = serialization.from_state_dict(like.opt_state, opt_state)
  carried = like.carried
  if carried is not None:
    carried = serialization.from_state_dict(carried, arrays['flax_mutables']['carried'])
  return TrainState(arrays['state']['step'], arrays['target'], opt_state, carried)


def _to_dict(tree: Any) -> dict[str, Any]:
  return serialization.to_state_dict(tree)


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
  # Parts of an optimizer without arrays would be empty folders.
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(tree))
