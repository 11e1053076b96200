"""The hyperparameters that are saved with a model, and what differs from those of now."""

import dataclasses
from typing import Any

from tvq_t5x.network.config import TransformerConfig

# They change speed and memory only.
_FREE = frozenset({'reduction', 'remat'})
# They change how a model is trained, not what it is: a run may go on with others.
_TRAINING = frozenset(
  {
    'block_len',  # Keys older than the window of a query's block have no gradient.
    'commit_weight',
    'dtype',
    'ema_decay',
    'grad_through_cache',
    'layer_drop_rate',
    'residual_dropout_rate',
    'sinusoid_dropout_rate',
  }
)


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
