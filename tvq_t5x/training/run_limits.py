"""What is wrong with the settings of a run, in either engine, said before anything is compiled."""

import jax

from tvq_t5x.common.errors import ConfigError, is_count
from tvq_t5x.data.datasets import DatasetConfig
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.quadratic import KeyValueState
from tvq_t5x.network.transformer import init_decoder_state
from tvq_t5x.training.base_model import Model

_UPDATE_LEN, _LENGTHS = 'train.update_len', 'DatasetConfig.task_feature_lengths'


def check_vocabulary(cfg: DatasetConfig, model: Model) -> None:
  """Refuses a task that is not of the model's kind, with its vocabulary or classes."""
  model.check_task(cfg.mixture_or_task_name, cfg.module)


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
  if config.bidirectional:
    if update_len not in (None, length):
      raise ConfigError(
        _UPDATE_LEN, update_len, 'None, as an encoder sees a sequence as a whole or not at all'
      )
    return 1
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
  segment_len: int | None, length: int, updates: int, config: TransformerConfig
) -> None:
  """Refuses segments that would not give the numbers of all tokens of an update at once.

  Args:
    segment_len: tokens of each sequence that are held at once; None means all that an update sees.
    length: T, tokens of a sequence.
    updates: that a batch gives.
    config: of the model.

  Raises:
    ConfigError: naming the setting, and what it accepts.
  """
  of_update, block = length // updates, config.block_len
  if segment_len in (None, of_update):
    return
  accepted = [n for n in _parts(of_update) if n == of_update or n % block == 0]
  needs = [x for x in ('bidirectional', 'codes_from_keys', 'replace_below') if getattr(config, x)]
  at_once = f', which TransformerConfig.{needs[0]} needs at once' if needs else ''
  if needs:
    accepted = [of_update]  # Every position, or key to choose from, has to be there.
  if not is_count(segment_len) or segment_len not in accepted:
    raise ConfigError(
      'train.segment_len',
      segment_len,
      f'one of {", ".join(map(str, accepted))}: equal parts, in blocks of '
      f'TransformerConfig.block_len = {block}, of the {of_update} tokens of an update{at_once}; '
      'or None for all',
    )
  needed = length - segment_len
  if config.kv_cache_len < needed and _keeps_keys(config):
    raise ConfigError(
      'TransformerConfig.kv_cache_len',
      config.kv_cache_len,
      f'at least {needed} with train.segment_len = {segment_len}',
      problem='would hide from quadratic attention what is older in a sequence',
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
