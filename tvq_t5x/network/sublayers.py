"""The sublayers of a layer, as `TransformerConfig.sublayers` names them."""

import collections
from collections.abc import Callable
from typing import NamedTuple

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


def name_of(cls: type[Mixer]) -> str | None:
  """The name that `TransformerConfig.sublayers` has for a class, if any.

  gin's own subclass of a class, which gives it settings, has the class's name.
  """
  for name, known in _MIXERS.items():
    if cls is known or (issubclass(cls, known) and cls.__qualname__ == known.__qualname__):
      return str(name)
  return None
