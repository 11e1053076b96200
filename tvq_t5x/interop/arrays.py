"""The parameters of a model by the names that they have in an exported folder.

Those are the names of `named_arrays` with dots, each layer's arrays apart:
`layers.3.attention_0.query.kernel`, whether or not the network scans its layers.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from tvq_t5x.common import named_arrays
from tvq_t5x.network.config import TransformerConfig

_STACKED = 'layers'
# Small, and what they are rounded to would be learned or decay otherwise.
_ALWAYS_FLOAT32 = ('quantizer', 'ssm')


class _Place(NamedTuple):
  name: str  # In a folder.
  ours: str
  layer: int | None  # The entry of our array, which is stacked over layers.


def shapes(params: Any, config: TransformerConfig) -> dict[str, tuple[int, ...]]:
  """The shapes in a folder of a model's parameters, or of what has their shapes."""
  leaves = named_arrays.leaves_of(params)
  return {
    x.name: tuple(leaves[x.ours].shape)[0 if x.layer is None else 1 :]
    for x in _places(leaves, config)
  }


def by_name(params: Any, config: TransformerConfig) -> dict[str, np.ndarray]:
  """The parameters as they lie in a folder, in the dtypes that they have."""
  leaves = named_arrays.leaves_of(params)
  found, ours, array = {}, None, None
  for x in _places(leaves, config):
    if x.ours != ours:  # Brought from the devices once.
      ours, array = x.ours, np.asarray(leaves[x.ours])
    assert array is not None
    found[x.name] = np.asarray(array if x.layer is None else array[x.layer])
  return found


def to_params(like: Any, config: TransformerConfig, read: Callable[[str], np.ndarray]) -> Any:
  """The inverse of `by_name`.

  Args:
    like: parameters, or what stands in their place.
    config: of the model.
    read: gives the array of a name.

  Returns:
    Nested dicts of float32 arrays.
  """
  parts: dict[str, Any] = {}
  for x in _places(named_arrays.leaves_of(like), config):
    array = np.asarray(read(x.name), np.float32)
    if x.layer is None:
      parts[x.ours] = array
    else:
      parts.setdefault(x.ours, []).append(array)
  arrays = {name: np.stack(x) if isinstance(x, list) else x for name, x in parts.items()}
  return traverse_util.unflatten_dict(arrays, sep='/')


def is_always_float32(name: str) -> bool:
  """Whether an array is never written in fewer bits: codebooks and state-space layers."""
  return any(part in _ALWAYS_FLOAT32 for part in name.split('.'))


def differences(found: Mapping[str, Iterable[int]], expected: Mapping[str, Any]) -> list[str]:
  """What differs between the shapes of two sets of arrays, in words."""
  found, expected = ({n: list(x) for n, x in shapes.items()} for shapes in (found, expected))
  return named_arrays.differences(found, expected)


def _places(leaves: Iterable[str], config: TransformerConfig) -> Iterator[_Place]:
  for ours in leaves:
    top, _, rest = ours.partition('/')
    rest = rest.replace('/', '.')
    if config.scan_layers and top == _STACKED:
      for i in range(config.num_layers):
        yield _Place(f'{_STACKED}.{i}.{rest}', ours, i)
    elif found := re.fullmatch(rf'{_STACKED}_(\d+)', top):
      yield _Place(f'{_STACKED}.{found[1]}.{rest}', ours, None)
    else:
      yield _Place(ours.replace('/', '.'), ours, None)
