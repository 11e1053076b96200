"""Checkpoints of a run: arrays, data position and what they belong to, written as one, by Orbax."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from tvq_t5x.checkpoints import layout
from tvq_t5x.common import errors, named_arrays
from tvq_t5x.common.errors import CheckpointError, ConfigError
from tvq_t5x.data.datasets import POSITION, TrainingIterator
from tvq_t5x.training.train_state import TrainState

_DAMAGED = 'damaged'


def initial_state(checkpoint: pathlib.Path, scratch: TrainState) -> TrainState:
  """The state that a run starts from: that of a checkpoint, but what sequences carry on.

  Args:
    checkpoint: of another run, of either engine.
    scratch: a state as it is at step 0.

  Raises:
    CheckpointError: if it can't be read.
  """
  try:
    like = scratch._replace(carried=None)
    arrays = layout.restore(checkpoint, layout.state_dict(like))
    state = layout.from_state_dict(like, arrays)
    named_arrays.check_values(state, layout.read_metadata(checkpoint))
  except Exception as e:  # Whatever a reader of broken files may raise.
    raise layout.unreadable(checkpoint, e) from e
  return state._replace(carried=scratch.carried)


class Restored(NamedTuple):
  """What a checkpoint held, but the data position."""

  state: TrainState
  metadata: dict[str, Any]


class _DatasetHandler(ocp.CheckpointHandler):
  """Saves the position of a `TrainingIterator`: at once, as training goes on meanwhile."""

  def save(self, directory: Any, args: '_Dataset') -> None:
    args.iterator.save(directory)

  def restore(self, directory: Any, args: '_Dataset') -> None:
    args.iterator.restore(directory)


@ocp.args.register_with_handler(_DatasetHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Dataset(ocp.args.CheckpointArgs):
  iterator: TrainingIterator


@dataclasses.dataclass
class _Best:
  """Keeps the checkpoint that scored best so far."""

  best_step: Callable[[], int | None]

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    best = self.best_step()
    return [checkpoint.step == best for checkpoint in checkpoints]


class _Names(ocp.path.step.NameFormat[ocp.path.step.Metadata]):
  """The names of checkpoints, of which Orbax sees those of `layout` that are no links.

  It removes old ones, and what a link leads to is not this run's.
  """

  def __init__(self, prefix: str):
    self._names = ocp.path.step.standard_name_format(step_prefix=prefix)

  def build_name(self, step: int) -> str:
    return self._names.build_name(step)

  def find_all(self, base_path: Any) -> Iterator[ocp.path.step.Metadata]:
    folder = pathlib.Path(base_path)
    for step in layout.steps_in(folder):
      if not layout.folder(folder, step).is_symlink():
        yield self._names.find_step(base_path, step)

  def find_step(self, base_path: Any, step: int) -> ocp.path.step.Metadata:
    return self._names.find_step(base_path, step)


class Checkpoints:
  """The checkpoints in a run's folder; use it as a context."""

  def __init__(
    self, directory: pathlib.Path, keep: int | None, best_step: Callable[[], int | None]
  ):
    """Opens the folder, and clears away what an interrupted save has left in it.

    Args:
      directory: absolute path of the folder; it is created.
      keep: how many of the latest to keep; None keeps all.
      best_step: the step whose checkpoint is kept as well, asked at each save.
    """
    self._directory = directory
    if others := layout.others_in(directory):
      logging.warning(
        'No checkpoint, and passed over: %s.', ', '.join(path.name for path in others)
      )
    policies = [preservation_policy.LatestN(keep), _Best(best_step)]
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        step_name_format=_Names(layout.PREFIX),
        cleanup_tmp_directories=True,
        # The data position is written before the other items' folders would be there.
        async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
      ),
    )
    self._saved: list[int] = []  # By this object, the last one perhaps not to the end.

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    try:
      self.wait()
    except CheckpointError as e:
      if error is None:
        raise
      logging.error('%s', e)
    try:
      self._manager.close()
    except Exception as e:  # Said by `wait` already.
      logging.debug('%s', e)

  def steps(self) -> list[int]:
    """The steps of complete checkpoints."""
    return layout.steps_in(self._directory)

  def save(
    self, step: int, state: TrainState, batches: TrainingIterator, metadata: Mapping[str, Any]
  ) -> None:
    """Starts a save; all of it appears in the folder at once when it is complete.

    Args:
      step: names the checkpoint.
      state: may be donated as soon as this returns.
      batches: whose position is saved.
      metadata: JSON; see `restore`.

    Raises:
      CheckpointError: if this save or the one before failed.
    """
    self.wait()
    self._saved.append(step)
    try:
      self._clear_the_way(step)
    except OSError as e:
      raise self._failed(e) from e
    items = ocp.args.Composite(
      **{
        layout.STATE: ocp.args.StandardSave(layout.state_dict(state)),
        layout.DATASET: _Dataset(batches),
        layout.METADATA: ocp.args.JsonSave(
          {**metadata, 'checksums': named_arrays.checksums(state)}
        ),
      }
    )
    try:
      self._manager.save(step, args=items, force=True)
    except Exception as e:
      raise self._failed(e) from e

  def _clear_the_way(self, step: int) -> None:
    """Moves away what has the name of a checkpoint to be written, and unlinks a temporary one."""
    path = layout.folder(self._directory, step)
    if os.path.lexists(path):
      logging.warning('%s was moved to %s.', path, self._move_away(step))
    for left in self._directory.iterdir():
      # Orbax removes what an interrupted save has left, but for links.
      if left.is_symlink() and left.name.startswith(f'{path.name}.'):
        left.unlink()

  def wait(self) -> None:
    """Waits for the save that has been started.

    Raises:
      CheckpointError: if it failed.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as e:
      raise self._failed(e) from e

  def _failed(self, error: Exception) -> CheckpointError:
    step = self._saved[-1] if self._saved else None
    complete = [s for s in self.steps() if s != step]
    rest = f'that of step {complete[-1]} is complete and unharmed' if complete else 'there is none'
    return CheckpointError(
      f'The checkpoint of step {step} could not be saved in {self._directory}: '
      f'{errors.reason(error)} Of earlier checkpoints, {rest}. Make room or mend the folder, then '
      'run the same command again to continue from there.'
    )

  def restore(self, abstract: TrainState, batches: TrainingIterator, updates: int = 1) -> Restored:
    """The newest checkpoint that can be read; damaged ones after it are moved away.

    Args:
      abstract: shapes, dtypes and shardings.
      batches: gets the position.
      updates: steps that a batch gives, to find the position where T5X has not saved it.

    Returns:
      The state, and what `save` got as metadata; T5X's checkpoints have none.

    Raises:
      ConfigError: if the data position belongs to other settings.
      CheckpointError: if there is none that can be read.
    """
    damaged: dict[int, str] = {}
    for step in reversed(self.steps()):
      try:
        restored = self._read(step, abstract, batches, updates)
      except ConfigError:
        raise
      except Exception as e:  # Whatever a reader of broken files may raise.
        damaged[step] = errors.reason(e)
        continue
      for broken, why in damaged.items():
        target = self._move_away(broken)
        logging.warning(
          'The checkpoint of step %d is damaged (%s). It was moved to %s, and the run continues '
          'from the checkpoint of step %d.', broken, why, target, step,
        )  # fmt: skip
      self._manager.reload()
      return restored
    reasons = '; '.join(f'step {step}: {why}' for step, why in damaged.items())
    raise CheckpointError(
      f'No checkpoint in {self._directory} can be read ({reasons or "there is none"}). To start '
      'from step 0, give another train.model_dir or remove that folder.'
    )

  def _read(
    self, step: int, abstract: TrainState, batches: TrainingIterator, updates: int
  ) -> Restored:
    path = layout.folder(self._directory, step)
    ours = layout.is_standalone(path)
    metadata = layout.read_metadata(path)
    items: dict[str, Any] = {layout.STATE: ocp.args.StandardRestore(layout.state_dict(abstract))}
    position = (path / layout.DATASET / f'{POSITION}.index').exists()
    if ours and not position:
      raise FileNotFoundError(
        f'no {layout.DATASET}/{POSITION}, as where it was converted: a new run may start from it '
        'with INITIAL_CHECKPOINT_PATH'
      )
    if position:
      items[layout.DATASET] = _Dataset(batches)
    arrays = self._manager.restore(step, args=ocp.args.Composite(**items))[layout.STATE]
    state = layout.from_state_dict(abstract, arrays)
    named_arrays.check_values(state, metadata)
    if int(state.step) != step:
      raise ValueError('wrong values in step')
    if not position:
      # T5X saves none by default, and one for each host where there are several.
      batches.skip(layout.batches_before(path, updates))
    return Restored(state, metadata)

  def _move_away(self, step: int) -> pathlib.Path:
    source = layout.folder(self._directory, step)
    folder = self._folder_of_damaged()
    folder.mkdir(exist_ok=True)
    target = _free(folder / source.name, os.path.lexists)
    source.rename(target)
    return target

  def _folder_of_damaged(self) -> pathlib.Path:
    """One in the run's folder: a link of that name may lead anywhere."""

    def is_taken(path: pathlib.Path) -> bool:
      return path.is_symlink() or (path.exists() and not path.is_dir())

    return _free(self._directory / _DAMAGED, is_taken)


def _free(path: pathlib.Path, is_taken: Callable[[pathlib.Path], bool]) -> pathlib.Path:
  """`path`, or the first of path.1, path.2, ... that is not taken."""
  found, i = path, 0
  while is_taken(found):
    i += 1
    found = path.with_name(f'{path.name}.{i}')
  return found
