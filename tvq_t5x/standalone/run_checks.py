"""What is wrong with the settings of a run, said before anything is compiled."""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from tvq_t5x import datasets
from tvq_t5x.config import TransformerConfig
from tvq_t5x.datasets import DatasetConfig
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


def check_vocabulary(cfg: DatasetConfig, model: TransformerVQModel) -> None:
  """Refuses a task with another vocabulary than the model's."""
  vocabulary = datasets.vocabulary(cfg.mixture_or_task_name, cfg.module)
  if vocabulary != model.output_vocabulary:
    raise ConfigError(
      f'TransformerVQModel.vocabulary = {model.output_vocabulary} is not the one of the task '
      f'{cfg.mixture_or_task_name} (macro MIXTURE_OR_TASK_NAME): give {vocabulary}.'
    )


def updates_in_batch(cfg: DatasetConfig, config: TransformerConfig, update_len: int | None) -> int:
  """Parameter updates that a batch gives, T / update_len.

  Raises:
    ConfigError: if blocks, updates and sequences are no multiples of each other.
  """
  length = cfg.task_feature_lengths['targets']
  name = f"task_feature_lengths['targets'] = {length} (macro TASK_FEATURE_LENGTHS)"
  if update_len is not None and not _is_count(update_len):
    raise ConfigError(
      f'train.update_len = {update_len!r} (macro UPDATE_LEN): give a whole number of tokens, or '
      'None for whole sequences.'
    )
  segment = length if update_len is None else update_len
  block = config.block_len
  if segment > block and segment % block:
    raise ConfigError(
      f'{name if update_len is None else f"train.update_len = {segment} (macro UPDATE_LEN)"} is '
      f'not a whole number of blocks: give a multiple of TransformerConfig.block_len = {block}, '
      f'such as {_multiples_near(segment, block)}, or a block_len that divides {segment}.'
    )
  if length % segment:
    accepted = [
      n for n in range(1, length + 1) if length % n == 0 and (n % block == 0 or n < block)
    ]
    raise ConfigError(
      f'train.update_len = {segment} (macro UPDATE_LEN) does not divide {name}: give one of '
      f'{", ".join(map(str, accepted))}.'
    )
  return length // segment


def check_steps(updates: int, total_steps: int, **periods: int | None) -> None:
  """Refuses numbers of steps that do not end with a batch; periods may be None.

  Args:
    updates: steps that a batch gives.
    total_steps: of the run.
    **periods: by name.
  """
  names = {'total_steps': 'train.total_steps (macro TRAIN_STEPS)'}
  for name, value in {'total_steps': total_steps, **periods}.items():
    if value is None and name in periods:
      continue
    shown = names.get(name, f'train.{name}')
    if value is None or not _is_count(value):
      accepted = ' or None' if name in periods else ''
      raise ConfigError(f'{shown} = {value!r}: give a whole number of at least 1{accepted}.')
    if value % updates:
      raise ConfigError(
        f'{shown} = {value}: give a multiple of {updates}, the updates that a batch of sequences '
        f'gives (sequence length / update_len), such as {_multiples_near(value, updates)}.'
      )


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
  config = dataclasses.asdict(model.config)
  return {
    'model': {k: str(v) if k == 'dtype' else v for k, v in config.items()},
    'arrays': {row.name: [list(row.shape), row.dtype] for row in info.rows},
    'updates_in_batch': updates,
    'random_seed': random_seed,
  }


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
  found = checkpoints.newest_metadata(model_dir / 'checkpoints')
  if found is None:
    return []
  step, saved = found
  old, new = saved['model'], record['model']
  changed = {
    k: f'TransformerConfig.{k} = {new.get(k)!r}, there {old.get(k)!r}'
    for k in sorted(old.keys() | new.keys())
    if old.get(k) != new.get(k) and k not in _FREE
  }
  refused = [text for k, text in changed.items() if k not in _TRAINING]
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
  differences = [text for k, text in changed.items() if k in _TRAINING]
  for name in ('updates_in_batch', 'random_seed'):
    if saved[name] != record[name]:
      differences.append(f'{name} = {record[name]}, there {saved[name]}')
  return differences


def _different_arrays(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
  shown = [f'{n} is {_shape(new.get(n))}, there {_shape(old.get(n))}' for n in names[:3]]
  rest = [f'and {len(names) - 3} more arrays (another optimizer?)'] if len(names) > 3 else []
  return shown + rest


def _shape(array: list[Any] | None) -> str:
  return 'missing' if array is None else f'{array[1]}{array[0]}'


def _multiples_near(value: int, unit: int) -> str:
  low = max(value // unit, 1) * unit
  return ' or '.join(map(str, dict.fromkeys([low, -(-value // unit) * unit])))


def _is_count(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0
