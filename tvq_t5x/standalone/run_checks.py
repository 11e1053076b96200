"""What is wrong with where a standalone run is to write, said before anything is compiled."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any

import jax
from absl import logging

from tvq_t5x.checkpoints import layout, model_settings
from tvq_t5x.common import errors, files, named_arrays
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import classification, datasets, registered
from tvq_t5x.gin_support import descriptions
from tvq_t5x.standalone.run_settings import RunSettings
from tvq_t5x.training.base_model import Model
from tvq_t5x.training.placement import StateInfo

_PARAMS = 'params/'  # Before the names of parameters in a train state.


def check_one_process() -> None:
  """Refuses more than one process."""
  if jax.process_count() > 1:
    raise ConfigError(
      f'The standalone runner runs in one process, and here are {jax.process_count()}: train on '
      'several hosts with T5X (python -m t5x.train with the same gin files).'
    )


@contextlib.contextmanager
def missing_data() -> Iterator[None]:
  """Tasks name the package that their text comes from: that is all that needs to be said."""
  try:
    yield
  except ModuleNotFoundError as e:
    raise ConfigError(str(e)) from e


def resolve_model_dir(model_dir: str) -> pathlib.Path:
  """The absolute path of a run's folder, which this creates nothing in.

  Raises:
    ConfigError: if it can't be written, or checkpoints in it could not be read.
  """
  if '://' in model_dir or not model_dir:
    raise ConfigError(
      'train.model_dir', model_dir, 'the path of a local folder, for the standalone runner'
    )
  given = f'train.model_dir = {model_dir!r}'
  path = files.absolute(model_dir, given)
  files.check_name(path, given)
  existing = next(p for p in (path, *path.parents) if p.exists())
  if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
    what = 'can not be written' if existing.is_dir() else 'is a file'
    problem = f'is not accepted, as {existing} {what}'
    raise ConfigError('train.model_dir', model_dir, 'a folder of yours', problem)
  return path


@contextlib.contextmanager
def locked(model_dir: pathlib.Path) -> Iterator[None]:
  """Creates a run's folder and keeps other runs out of it; the lock ends with the process."""
  try:
    model_dir.mkdir(parents=True, exist_ok=True)
    lock = (model_dir / '.lock').open('w')
  except OSError as e:
    raise ConfigError(f'{model_dir} can not be written ({e}): give another train.model_dir.') from e
  with lock:
    try:
      _lock(lock)
    except BlockingIOError as e:
      raise ConfigError(
        f'{model_dir}: another run is writing there; give another train.model_dir, or wait for its '
        'end.'
      ) from e
    except OSError as e:
      logging.warning(
        'Another run in %s would not be noticed: its file system has no locks (%s).', model_dir, e
      )
    yield


def _lock(file: IO[str]) -> None:
  try:
    import fcntl
  except ImportError as e:  # It is of Unix only.
    raise OSError(str(e)) from e
  fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def cuts(settings: RunSettings) -> list[str]:
  """What is said of the examples that lose their tail, a line a split; nothing where none does."""
  lines = []
  for cfg in settings.dataset_cfgs:
    task = registered.task_or_mixture(cfg.mixture_or_task_name, cfg.module)
    length = cfg.task_feature_lengths[settings.model.LENGTH_FEATURE]
    if number := classification.num_cut(task, cfg.split, length):
      lines.append(f'{task.name}, {cfg.split}: {number:,} examples are cut to {length:,}')
  return lines


def record_of(
  settings: RunSettings, info: StateInfo, data: dict[str, Any] | None = None
) -> dict[str, Any]:
  """What a checkpoint says of the run that wrote it.

  Args:
    settings: of the run.
    info: of its state.
    data: `datasets.identity` where it is known already; else the data is looked for.
  """
  return {
    'model': model_settings.settings_of(settings.model.config),
    'arrays': {row.name: [list(row.shape), row.dtype] for row in info.rows},
    'updates_in_batch': settings.updates,
    'random_seed': settings.random_seed,
    'data': data or datasets.identity(settings.train_dataset_cfg, settings.model.carry_state),
    'training': {
      'train.total_steps': settings.total_steps,
      **_optimizer(settings.model),
    },
  }


def _optimizer(model: Model) -> dict[str, Any]:
  """How gin built it; a model's class may be gin's own subclass of one."""
  described = (descriptions.of_parameter(cls, 'optimizer') for cls in type(model).__mro__)
  return next(filter(None, described), {})


def check_same_model(model_dir: pathlib.Path, record: dict[str, Any]) -> list[str]:
  """Compares the checkpoints in a folder, if any, with the model that is to be trained.

  Args:
    model_dir: the folder.
    record: from `record_of`.

  Returns:
    Differences that a run may go on with, in words.

  Raises:
    ConfigError: if the checkpoints are of another model or optimizer.
  """
  found = layout.newest_metadata(model_dir)
  if found is None:
    _check_same_as_of_t5x(model_dir, record)
    return []
  step, saved = found
  refused, accepted = model_settings.differences(saved['model'], record['model'])
  if not refused and saved['arrays'] != record['arrays']:
    refused = _different_arrays(saved['arrays'], record['arrays'])
  if not refused and step % record['updates_in_batch']:
    refused = [
      f'train.update_len gives {record["updates_in_batch"]} updates a batch, there '
      f'{saved["updates_in_batch"]}'
    ]
  if refused:
    raise _of_another('model', model_dir, step, refused)
  if refused := datasets.differences(saved.get('data', record['data']), record['data']):
    raise _of_another('run', model_dir, step, refused)
  for name in ('updates_in_batch', 'random_seed'):
    if saved[name] != record[name]:
      accepted.append(f'{name} = {record[name]}, there {saved[name]}')
  return accepted + _different_training(saved.get('training', {}), record['training'])


def _different_training(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """What differs where both say something: an earlier version has not written all."""
  return [
    f'{name} = {_shown(new[name])}, there {_shown(old[name])}'
    for name in new
    if name in old and old[name] != new[name]
  ]


def _shown(value: Any) -> str:
  return value if str(value).startswith('@') else repr(value)


def _check_same_as_of_t5x(model_dir: pathlib.Path, record: dict[str, Any]) -> None:
  """Compares the parameters and the data of a checkpoint that only T5X can have written."""
  steps = layout.steps_in(model_dir)
  if not steps:
    return
  path = layout.folder(model_dir, steps[-1])
  try:
    saved, data = layout.param_shapes(path), layout.data_identity(path)
  except Exception:  # Whatever a reader of broken files may raise: its restoration will say more.
    return
  if refused := named_arrays.differences(saved, _param_shapes(record)):
    raise _of_another('model', model_dir, steps[-1], refused)
  if refused := datasets.differences(data, record['data']):
    raise _of_another('run', model_dir, steps[-1], refused)


def _param_shapes(record: dict[str, Any]) -> dict[str, list[int]]:
  shapes = {name: shape for name, (shape, _) in record['arrays'].items()}
  return {n.removeprefix(_PARAMS): x for n, x in shapes.items() if n.startswith(_PARAMS)}


def check_initial_checkpoint(settings: RunSettings, record: dict[str, Any]) -> pathlib.Path:
  """Finds the checkpoint that a run is to start from.

  Args:
    settings: of the run, with an `initial_checkpoint`.
    record: from `record_of`.

  Raises:
    ConfigError: if there is none, or it is of another model or optimizer.
  """
  given = settings.initial_checkpoint
  assert given is not None
  path = layout.find(given, f'train.initial_checkpoint = {given!r}')
  step = layout.step_of(path)
  try:
    refused = named_arrays.differences(layout.param_shapes(path), _param_shapes(record))
    other = layout.other_vocabulary(path, settings.model.data_identity)
    saved = layout.read_metadata(path)
    if saved and not refused:
      found, _ = model_settings.differences(saved['model'], record['model'])
      # What the new run has no use for is left behind, as the count of a constant learning rate.
      needed = {n: x for n, x in record['arrays'].items() if not n.startswith('carried/')}
      there = {n: x for n, x in saved['arrays'].items() if n in needed}
      refused = found or _different_arrays(there, needed)
  except (OSError, ValueError) as e:
    raise ConfigError(
      f'{path} can not be read: {errors.reason(e)} Give another train.initial_checkpoint.'
    ) from e
  if refused:
    raise ConfigError(
      f'{path} is of another model or optimizer: {"; ".join(refused)}. Give another '
      'train.initial_checkpoint, or its settings.'
    )
  if other:
    logging.warning('%s was trained with another vocabulary: %s.', path, other)
  if settings.total_steps <= step or step % settings.updates:
    raise ConfigError(
      'train.total_steps',
      settings.total_steps,
      'more steps than those, and a checkpoint at the end of a batch',
      problem=f'counts the {step} steps of train.initial_checkpoint too, and batches have '
      f'{settings.updates} steps',
    )
  return path


def _of_another(
  what: str, model_dir: pathlib.Path, step: int, differences: list[str]
) -> ConfigError:
  return ConfigError(
    f'{model_dir} holds a checkpoint (step {step}) of another {what}: {"; ".join(differences)}. '
    f'Give another train.model_dir, or the settings of that {what}.'
  )


def _different_arrays(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  old, new = (
    {name: f'{dtype}{shape}' for name, (shape, dtype) in arrays.items()} for arrays in (old, new)
  )
  return named_arrays.differences(old, new, ' (another optimizer?)')
