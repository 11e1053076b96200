"""What is wrong with where a standalone run is to write, said before anything is compiled."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from tvq_t5x.config import TransformerConfig
from tvq_t5x.errors import ConfigError
from tvq_t5x.models import TransformerVQModel
from tvq_t5x.partitioning import StateInfo
from tvq_t5x.standalone import checkpoints

# They change speed and memory only.
_FREE = frozenset({'block_len', 'reduction', 'remat'})
# They change how a model is trained, not what it is: a run may go on with others.
_TRAINING = frozenset(
  {
    'commit_weight',
    'dtype',
    'ema_decay',
    'grad_through_cache',
    'layer_drop_rate',
    'residual_dropout_rate',
    'sinusoid_dropout_rate',
  }
)


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
  """The absolute path of MODEL_DIR, which this creates nothing in.

  Raises:
    ConfigError: if it can't be written.
  """
  if '://' in model_dir or not model_dir:
    raise ConfigError(
      f'MODEL_DIR = {model_dir!r}: the standalone runner writes to a local folder; give its path.'
    )
  path = pathlib.Path(model_dir).expanduser().absolute()
  existing = next(p for p in (path, *path.parents) if p.exists())
  if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
    what = 'can not be written' if existing.is_dir() else 'is a file'
    raise ConfigError(f'MODEL_DIR = {model_dir!r}: {existing} {what}; give a folder of yours.')
  return path


@contextlib.contextmanager
def locked(model_dir: pathlib.Path) -> Iterator[None]:
  """Creates MODEL_DIR and keeps other runs out of it; the lock ends with the process."""
  try:
    model_dir.mkdir(parents=True, exist_ok=True)
    lock = (model_dir / '.lock').open('w')
  except OSError as e:
    raise ConfigError(f'MODEL_DIR = {str(model_dir)!r} can not be written: {e}.') from e
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise ConfigError(
        f'MODEL_DIR = {str(model_dir)!r}: another run is writing there; give another folder, or '
        'wait for its end.'
      ) from e
    yield


def record_of(
  model: TransformerVQModel, info: StateInfo, updates: int, random_seed: int
) -> dict[str, Any]:
  """What a checkpoint says of the run that wrote it."""
  return {
    'model': settings_of(model.config),
    'arrays': {row.name: [list(row.shape), row.dtype] for row in info.rows},
    'updates_in_batch': updates,
    'random_seed': random_seed,
  }


def settings_of(config: TransformerConfig) -> dict[str, Any]:
  """The hyperparameters of a model as JSON has them."""
  return {k: str(v) if k == 'dtype' else v for k, v in dataclasses.asdict(config).items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
  """Compares two models' `settings_of`, less what changes speed and memory only.

  Returns:
    In words, differences of what the models compute, and of how they are trained.
  """
  changed = {
    k: f'TransformerConfig.{k} = {new.get(k)!r}, there {old.get(k)!r}'
    for k in sorted(old.keys() | new.keys())
    if old.get(k) != new.get(k) and k not in _FREE
  }
  return (
    [text for k, text in changed.items() if k not in _TRAINING],
    [text for k, text in changed.items() if k in _TRAINING],
  )


def check_same_model(model_dir: pathlib.Path, record: dict[str, Any]) -> list[str]:
  """Compares the checkpoints of MODEL_DIR, if any, with the model that is to be trained.

  Args:
    model_dir: of the run.
    record: from `record_of`.

  Returns:
    Differences that a run may go on with, in words.

  Raises:
    ConfigError: if the checkpoints are of another model or optimizer.
  """
  found = checkpoints.newest_metadata(model_dir)
  if found is None:
    return []
  step, saved = found
  refused, accepted = differences(saved['model'], record['model'])
  if not refused and saved['arrays'] != record['arrays']:
    refused = _different_arrays(saved['arrays'], record['arrays'])
  if not refused and step % record['updates_in_batch']:
    refused = [
      f'update_len gives {record["updates_in_batch"]} updates a batch, there '
      f'{saved["updates_in_batch"]}'
    ]
  if refused:
    raise ConfigError(
      f'MODEL_DIR = {str(model_dir)!r} holds a checkpoint (step {step}) of another model: '
      f'{"; ".join(refused)}. Give another MODEL_DIR, or the settings of that model.'
    )
  for name in ('updates_in_batch', 'random_seed'):
    if saved[name] != record[name]:
      accepted.append(f'{name} = {record[name]}, there {saved[name]}')
  return accepted


def _different_arrays(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
  shown = [f'{n} is {_shape(new.get(n))}, there {_shape(old.get(n))}' for n in names[:3]]
  rest = [f'and {len(names) - 3} more arrays (another optimizer?)'] if len(names) > 3 else []
  return shown + rest


def _shape(array: list[Any] | None) -> str:
  return 'missing' if array is None else f'{array[1]}{array[0]}'
