"""The hyperparameters that are saved with a model, and what differs from those of now."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tvq_t5x.network import sublayers
from tvq_t5x.network.config import TransformerConfig, standard_sublayers

# They change speed and memory only.
_FREE = frozenset({'reduction', 'remat', 'unroll_layers'})
# They change how a model is trained, not what it is: a run may go on with others.
_TRAINING = frozenset(
  {
    'block_len',  # Keys older than the window of a query's block have no gradient.
    'codes_from_keys',
    'commit_weight',
    'dtype',
    'ema_decay',
    'grad_through_cache',
    'kv_cache_len',
    'layer_drop_rate',
    'replace_below',
    'residual_dropout_rate',
    'sinusoid_dropout_rate',
  }
)


def settings_of(config: TransformerConfig) -> dict[str, Any]:
  """The hyperparameters of a model as JSON has them."""
  return {
    **dataclasses.asdict(config),
    'dtype': str(config.dtype),
    'value_dim': config.value_width,
    'sublayers': [_settings_of_sublayer(x) for x in sublayers.of_layer(config)],
  }


def _settings_of_sublayer(sublayer: sublayers.NamedMixer) -> Any:
  """The name of a mixer; with its own settings, where these are not the defaults.

  Less those that change speed and memory only.
  """
  cls = type(sublayer.mixer)
  name = sublayers.name_of(cls) or f'{cls.__module__}.{cls.__qualname__}'
  changed = {
    setting: value if isinstance(value, str | int | float | None) else repr(value)
    for setting, value in sublayers.changed_settings(sublayer.mixer).items()
    if setting not in cls.SPEED_ONLY
  }
  return {name: changed} if changed else name


def _complete(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Settings that an earlier version saved, with what there was no setting for then."""
  missing = {
    f.name: f.default
    for f in dataclasses.fields(TransformerConfig)
    if f.default is not dataclasses.MISSING
  }
  standard = standard_sublayers(settings['head_type'], settings['attention_type'])
  return {**missing, 'sublayers': list(map(str, standard)), **settings}


def is_complete(settings: Any) -> bool:
  """Whether it is what `settings_of` gives, perhaps of an earlier version: it may be damaged."""
  try:
    differences(settings, settings)
  except (AttributeError, KeyError, TypeError, ValueError):
    return False
  return True


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
  """Compares two models' `settings_of`, less what changes speed and memory only.

  Args:
    old: settings, perhaps of an earlier version.
    new: likewise.

  Returns:
    In words, differences of what the models compute, and of how they are trained.
  """
  old, new = _complete(old), _complete(new)
  changed = {
    k: f'TransformerConfig.{k} = {new.get(k)!r}, there {old.get(k)!r}'
    for k in sorted(old.keys() | new.keys())
    if old.get(k) != new.get(k) and k not in _FREE
  }
  return (
    [text for k, text in changed.items() if k not in _TRAINING],
    [text for k, text in changed.items() if k in _TRAINING],
  )
