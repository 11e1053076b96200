"""What is wrong with the settings of a run, in either engine, said before anything is compiled."""

import jax

from tvq_t5x.common.errors import ConfigError, is_count
from tvq_t5x.data import datasets
from tvq_t5x.data.datasets import DatasetConfig
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.quadratic import KeyValueState
from tvq_t5x.network.transformer import init_decoder_state
from tvq_t5x.training.models import TransformerVQModel

_UPDATE_LEN, _LENGTHS = 'train.update_len', 'DatasetConfig.task_feature_lengths'


def check_vocabulary(cfg: DatasetConfig, model: TransformerVQModel) -> None:
  """Refuses a task with another vocabulary than the model's."""
  vocabulary = datasets.vocabulary(cfg.mixture_or_task_name, cfg.module)
  if vocabulary != model.output_vocabulary:
    raise ConfigError(
      f'TransformerVQModel.vocabulary = {model.output_vocabulary} is not the one of '
      f'DatasetConfig.mixture_or_task_name = {cfg.mixture_or_task_name!r}: give {vocabulary}.'
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
  if update_len is not None and not is_count(update_len):
    raise ConfigError(
      _UPDATE_LEN, update_len, 'a whole number of tokens, or None for whole sequences'
    )
  lengths = {'targets': length}
  segment = length if update_len is None else update_len
  block = config.block_len
  if segment > block and segment % block:
    name, value = (_LENGTHS, lengths) if update_len is None else (_UPDATE_LEN, segment)
    raise ConfigError(
      name,
      value,
      f'a multiple of TransformerConfig.block_len = {block}, such as '
      f'{_multiples_near(segment, block)}, or a block_len that divides {segment}',
      problem='is not a whole number of blocks',
    )
  if length % segment:
    accepted = [n for n in _parts(length) if n % block == 0 or n < block]
    raise ConfigError(
      _UPDATE_LEN,
      segment,
      f'one of {", ".join(map(str, accepted))}',
      problem=f'does not divide {_LENGTHS} = {lengths}',
    )
  return length // segment


def check_segment_len(
  segment_len: int | None, update_tokens: int, config: TransformerConfig
) -> None:
  """Refuses segments that an update's part of a sequence is no multiple of.

  Args:
    segment_len: tokens of each sequence that are held at once; None means all that an update sees.
    update_tokens: those.
    config: of the model.

  Raises:
    ConfigError: naming the setting, and what it accepts.
  """
  accepted = [n for n in _parts(update_tokens) if n == update_tokens or n % config.block_len == 0]
  if segment_len is not None and not (is_count(segment_len) and segment_len in accepted):
    raise ConfigError(
      'train.segment_len',
      segment_len,
      f'one of {", ".join(map(str, accepted))}, whole blocks (TransformerConfig.block_len = '
      f'{config.block_len}) that share out the {update_tokens} tokens of an update evenly; or None '
      'for all of these at once',
    )
  needed = update_tokens - (segment_len or update_tokens)
  if config.kv_cache_len < needed and _keeps_keys(config):
    raise ConfigError(
      'TransformerConfig.kv_cache_len',
      config.kv_cache_len,
      f'at least {needed} with train.segment_len = {segment_len}',
      problem=f"would hide from quadratic attention what is older in an update's {update_tokens} "
      'tokens',
    )


def _keeps_keys(config: TransformerConfig) -> bool:
  """Whether a sublayer remembers single positions, as many as `kv_cache_len`."""
  state = jax.eval_shape(lambda: init_decoder_state(config, 1))
  nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, KeyValueState))
  return any(isinstance(x, KeyValueState) for x in nodes)


def _parts(length: int) -> list[int]:
  """The lengths of equal parts."""
  return [n for n in range(1, length + 1) if length % n == 0]


def check_steps(updates: int, total_steps: int, **periods: int | None) -> None:
  """Refuses numbers of steps that do not end with a batch; periods may be None.

  Args:
    updates: steps that a batch gives.
    total_steps: of the run.
    **periods: by name.
  """
  for name, value in {'total_steps': total_steps, **periods}.items():
    if value is None and name in periods:
      continue
    if not is_count(value):
      accepted = ' or None' if name in periods else ''
      raise ConfigError(f'train.{name}', value, f'a whole number of at least 1{accepted}')
    if value % updates:
      raise ConfigError(
        f'train.{name}',
        value,
        f'a multiple of {updates}, such as {_multiples_near(value, updates)}',
        problem=f'does not end with a batch of sequences, which gives {updates} updates (sequence '
        'length / update_len)',
      )


def _multiples_near(value: int, unit: int) -> str:
  low = max(value // unit, 1) * unit
  return ' or '.join(map(str, dict.fromkeys([low, -(-value // unit) * unit])))
