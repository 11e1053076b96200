"""The sublayers of a layer, as `TransformerConfig.sublayers` names them."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network.config import Sublayer, TransformerConfig
from tvq_t5x.network.longvq.longvq import LongVQ
from tvq_t5x.network.mixers import Mixer
from tvq_t5x.network.mlp import Mlp
from tvq_t5x.network.quadratic import QuadraticAttention
from tvq_t5x.network.vq.mixer import VQAttention

_MIXERS: dict[str, type[Mixer]] = {
  Sublayer.VQ: VQAttention,
  Sublayer.QUADRATIC: QuadraticAttention,
  Sublayer.MLP: Mlp,
  Sublayer.LONGVQ: LongVQ,
}
# Settings with a default, of the config, and which of these mixers read them.
_READ_BY: dict[str, tuple[type[Mixer], ...]] = {
  **dict.fromkeys(('mlp_dim', 'mlp_activation'), (Mlp,)),
  'kv_cache_len': (QuadraticAttention, LongVQ),
  **dict.fromkeys(
    ('compressed_cache', 'grad_through_cache', 'codes_from_keys', 'replace_below'),
    (VQAttention, LongVQ),
  ),
}


_OF_EVERY_MIXER = frozenset({'config', 'deterministic', 'name', 'parent'})


class NamedMixer(NamedTuple):
  """One sublayer of every layer."""

  name: str  # Of its parameters within the layer.
  make: Callable[..., Mixer]  # A class, or what creates it.
  mixer: Mixer  # Without parameters: knows the state.


def of_layer(config: TransformerConfig) -> tuple[NamedMixer, ...]:
  """The sublayers of a layer, in order.

  Raises:
    ConfigError: if one of `config.sublayers` creates no Mixer.
  """
  found, counts = [], collections.Counter()
  for kind in config.layer_sublayers:
    make = _MIXERS[kind] if isinstance(kind, str) else kind
    mixer = make(config=config, deterministic=True, parent=None)
    if not isinstance(mixer, Mixer):
      raise ConfigError(
        f'TransformerConfig.sublayers: {kind!r} is no sublayer; give '
        f'{", ".join(repr(str(name)) for name in Sublayer)} or a subclass of '
        'tvq_t5x.network.mixers.Mixer, such as @my_module.MyMixer in gin.'
      )
    name = mixer.param_name(counts[mixer.KIND])
    counts[mixer.KIND] += 1
    found.append(NamedMixer(name, make, mixer))
  return tuple(found)


def changed_settings(mixer: Mixer) -> dict[str, Any]:
  """A mixer's own settings that are not the defaults."""
  fields = [f for f in dataclasses.fields(mixer) if f.name not in _OF_EVERY_MIXER]
  return {f.name: x for f in fields if (x := getattr(mixer, f.name)) != f.default}


def unused_settings(config: TransformerConfig) -> list[str]:
  """Names of settings that were given another value than their default, and change nothing.

  There are none where a sublayer is not of this package: it may read any.
  """
  mixers = [named.mixer for named in of_layer(config)]
  if any(name_of(type(mixer)) is None for mixer in mixers):
    return []
  return [
    field.name
    for field in dataclasses.fields(config)
    if (readers := _READ_BY.get(field.name))
    and getattr(config, field.name) != field.default
    and not any(isinstance(mixer, readers) for mixer in mixers)
  ]


def name_of(cls: type[Mixer]) -> str | None:
  """The name that `TransformerConfig.sublayers` has for a class, if any.

  gin's own subclass of a class, which gives it settings, has the class's name.
  """
  for name, known in _MIXERS.items():
    if cls is known or (issubclass(cls, known) and cls.__qualname__ == known.__qualname__):
      return str(name)
  return None
