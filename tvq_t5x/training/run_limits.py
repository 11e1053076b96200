"""What is wrong with the settings of a run, in either engine, said before anything is compiled."""

from tvq_t5x.common.errors import ConfigError, is_count
from tvq_t5x.data import datasets
from tvq_t5x.data.datasets import DatasetConfig
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.training.models import TransformerVQModel


def check_vocabulary(cfg: DatasetConfig, model: TransformerVQModel) -> None:
  """Refuses a task with another vocabulary than the model's."""
  vocabulary = datasets.vocabulary(cfg.mixture_or_task_name, cfg.module)
  if vocabulary != model.output_vocabulary:
    raise ConfigError(
      f'TransformerVQModel.vocabulary = {model.output_vocabulary} is not the one of the task '
      f'{cfg.mixture_or_task_name} (macro MIXTURE_OR_TASK_NAME): give {vocabulary}.'
    )


def updates_in_batch(length: int, config: TransformerConfig, update_len: int | None) -> int:
  """Parameter updates that a batch gives, T / update_len.

  Args:
    length: T, tokens of a sequence.
    config: of the model.
    update_len: tokens of each sequence that an update sees; None means T.

  Raises:
    ConfigError: if blocks, updates and sequences are no multiples of each other.
  """
  name = f"task_feature_lengths['targets'] = {length} (macro TASK_FEATURE_LENGTHS)"
  if update_len is not None and not is_count(update_len):
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
    if not is_count(value):
      accepted = ' or None' if name in periods else ''
      raise ConfigError(f'{shown} = {value!r}: give a whole number of at least 1{accepted}.')
    if value % updates:
      raise ConfigError(
        f'{shown} = {value}: give a multiple of {updates}, the updates that a batch of sequences '
        f'gives (sequence length / update_len), such as {_multiples_near(value, updates)}.'
      )


def _multiples_near(value: int, unit: int) -> str:
  low = max(value // unit, 1) * unit
  return ' or '.join(map(str, dict.fromkeys([low, -(-value // unit) * unit])))
