"""Where a checkpoint keeps what: the layout of T5X with Orbax, so that either engine reads both.

MODEL_DIR/checkpoint_N/
  state/     arrays: target/PARAMETER, state/step, state/param_states/..., and where the state of
             sequences is carried on, flax_mutables/carried/...
  dataset/   position in the training data, in files of tf.data, and the settings that it is for;
             T5X on several hosts has a folder process_I-of-N/ for each in it
  metadata/  of the standalone runner only: settings, checksums
"""

import json
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import orbax.checkpoint as ocp
from etils import epath

from tvq_t5x.checkpoints import record
from tvq_t5x.common import errors, files, named_arrays
from tvq_t5x.common.errors import CheckpointError, ConfigError
from tvq_t5x.training import train_state
from tvq_t5x.training.train_state import TrainState

if TYPE_CHECKING:
  pass

Folder = TypeVar('Folder', pathlib.Path, epath.Path)

STATE, DATASET, METADATA = 'state', 'dataset', 'metadata'  # Items of a checkpoint.
PREFIX = 'checkpoint'
# Beside a position that T5X saved: batches before it, in digits, for a start with other hosts.
BATCHES = 'batches'
_METADATA_FILE = 'metadata'  # Where Orbax puts an item of JSON.
_GIVE = "give a run's folder, or one of the checkpoint_N folders in it"


def folder(model_dir: Folder, step: int) -> Folder:
  """The checkpoint of a step."""
  return model_dir / f'{PREFIX}_{step}'


def steps_in(model_dir: pathlib.Path | epath.Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, which need not exist."""
  return sorted(step_of(path) for path in _entries(model_dir) if _is_checkpoint(path))


def others_in(model_dir: pathlib.Path) -> list[pathlib.Path]:
  """What is called like a checkpoint there and is none, such as an empty folder or a file."""
  named = (p for p in _entries(model_dir) if re.fullmatch(rf'{PREFIX}_\d+', p.name))
  return sorted(path for path in named if not _is_checkpoint(path))


def _entries(model_dir: pathlib.Path) -> list[pathlib.Path]:
  return list(model_dir.iterdir()) if model_dir.is_dir() else []


def _is_checkpoint(path: pathlib.Path) -> bool:
  """Whether a path has the name of a checkpoint, and is a folder with something in it."""
  if not re.fullmatch(rf'{PREFIX}_(0|[1-9]\d*)', path.name):
    return False
  try:
    return next(path.iterdir(), None) is not None
  except OSError:  # A file, a link to nothing, or removed meanwhile.
    return False


def candidates(checkpoint: str, given: str) -> list[pathlib.Path]:
  """The folders of what may be meant by a checkpoint, the best first; `find` has the first.

  Raises:
    ConfigError: if there is none.
  """
  path = _folder_given(checkpoint, given)
  if _has_arrays(path):
    return [path]
  steps = reversed(steps_in(path))
  found = [folder(path, step) for step in steps if _has_arrays(folder(path, step))]
  if not found:
    others = ', '.join(p.name for p in others_in(path))
    others = f' ({others}: without arrays)' if others else ''
    raise ConfigError(f'{given}: there is no checkpoint in it{others}; {_GIVE}.')
  return found


def _has_arrays(path: pathlib.Path) -> bool:
  return bool(re.fullmatch(rf'{PREFIX}_\d+', path.name)) and (path / STATE).is_dir()


def find(checkpoint: str, given: str) -> pathlib.Path:
  """The folder of a checkpoint.

  Args:
    checkpoint: that folder, `MODEL_DIR/checkpoint_N`, or MODEL_DIR, whose newest one is meant.
    given: the flag or setting with this value, for the message.

  Raises:
    ConfigError: if there is none.
  """
  return candidates(checkpoint, given)[0]


def _folder_given(checkpoint: str, given: str) -> pathlib.Path:
  if not checkpoint or '://' in checkpoint:
    raise ConfigError(f'{given}: {_GIVE}, on a local disk.')
  path = files.absolute(checkpoint, given)
  if not path.is_dir():
    raise ConfigError(f'{given}: there is no such folder; {_GIVE}.')
  return path


def batches_before(checkpoint: pathlib.Path | epath.Path, updates: int) -> int:
  """Training batches that a run has seen before a checkpoint of it.

  Args:
    checkpoint: its folder, as `folder` names it.
    updates: steps that a batch gives.
  """
  for path in _beside_position(checkpoint, BATCHES):
    return int(path.read_text())
  # A run of the standalone runner has them all from its own data.
  return step_of(checkpoint) // updates


def data_identity(checkpoint: pathlib.Path | epath.Path) -> dict[str, Any]:
  """The `datasets.identity` of the training data, as far as a checkpoint of either engine says."""
  from tvq_t5x.data import datasets

  for path in _beside_position(checkpoint, datasets.IDENTITY):
    return json.loads(path.read_text(encoding='utf-8'))
  return {}


def other_vocabulary(checkpoint: pathlib.Path | epath.Path, identity: str) -> str | None:
  """In words, that a checkpoint was trained with another vocabulary; None if it was not.

  Of a checkpoint that does not say, None, too.

  Args:
    checkpoint: its folder.
    identity: of the model's vocabulary, `Model.data_identity`.
  """
  from tvq_t5x.data import vocabularies

  old = data_identity(checkpoint).get('vocabulary')
  return vocabularies.difference(old, identity) if old not in (None, identity) else None


def _beside_position(checkpoint: Any, name: str) -> Iterator[Any]:
  """Files of a name beside a checkpoint's data position, of all hosts."""
  folder = checkpoint / DATASET
  yield from (*folder.glob(name), *folder.glob(f'process_*/{name}'))


def step_of(checkpoint: pathlib.Path | epath.Path) -> int:
  """The step of a checkpoint's folder, complete or being written."""
  return int(checkpoint.name.removeprefix(f'{PREFIX}_').partition('.')[0])


def is_standalone(checkpoint: pathlib.Path) -> bool:
  """Whether the standalone runner wrote a checkpoint, not T5X."""
  return (checkpoint / METADATA).exists()


def read_metadata(checkpoint: pathlib.Path) -> dict[str, Any]:
  """What the standalone runner says of its checkpoint; those of T5X have nothing to say.

  Raises:
    OSError: if it can't be read.
    ValueError: if it is none, naming the field that is missing or wrong, and the file.
  """
  if not is_standalone(checkpoint):
    return {}
  path = checkpoint / METADATA / _METADATA_FILE
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    record.check(found)
  except ValueError as e:
    raise ValueError(f'{e} in {path}') from None
  return found


def newest_metadata(directory: pathlib.Path) -> tuple[int, dict[str, Any]] | None:
  """Step and metadata of the newest checkpoint that has any."""
  for step in reversed(steps_in(directory)):
    try:
      if metadata := read_metadata(folder(directory, step)):
        return step, metadata
    except (OSError, ValueError):
      continue
  return None


def param_shapes(checkpoint: pathlib.Path) -> dict[str, list[int]]:
  """Shapes of the parameters in a checkpoint of either engine, by name."""
  arrays = ocp.PyTreeCheckpointHandler().metadata(epath.Path(checkpoint / STATE))
  return named_arrays.shapes(arrays.tree['target'])


def restore(checkpoint: pathlib.Path, item: Any) -> Any:
  """The arrays of a checkpoint that `item` has, with shapes, dtypes and shardings as there."""
  args = ocp.args.PyTreeRestore(
    item, ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
  )
  return ocp.PyTreeCheckpointHandler().restore(epath.Path(checkpoint / STATE), args=args)


def unreadable(checkpoint: pathlib.Path, error: Exception) -> CheckpointError:
  """What to say of a checkpoint that can't be read."""
  return CheckpointError(
    f'The checkpoint {checkpoint} can not be read: {errors.reason(error)} Give another one.'
  )


def state_dict(state: TrainState) -> dict[str, Any]:
  """The arrays of a TrainState (or what stands in their place) under their names on disk."""
  arrays = {
    'target': state.params,
    # Parts of an optimizer without arrays would be empty folders.
    'state': {'step': state.step, 'param_states': train_state.to_dict(state.opt_state)},
  }
  if state.carried is not None:
    arrays['flax_mutables'] = {'carried': train_state.to_dict(state.carried)}
  return arrays


def from_state_dict(like: TrainState, arrays: dict[str, Any]) -> TrainState:
  """The inverse of `state_dict`; `like` is any state with the same structure."""
  opt_state = train_state.from_dict(like.opt_state, arrays['state'].get('param_states', {}))
  carried = like.carried
  if carried is not None:
    carried = train_state.from_dict(carried, arrays['flax_mutables']['carried'])
  return TrainState(arrays['state']['step'], arrays['target'], opt_state, carried)
