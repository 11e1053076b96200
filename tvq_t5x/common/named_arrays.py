"""Arrays of a tree by their names, to compare what is there with what was saved."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import unfreeze


def array_name(path: Any) -> str:
  """Name of an array in a state, such as 'params/logits/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def leaves_of(tree: Any) -> dict[str, Any]:
  """The leaves of nested dicts by name, such as 'logits/kernel'; they may be tuples."""
  return traverse_util.flatten_dict(unfreeze(tree), sep='/')


def shapes(tree: Any) -> dict[str, list[int]]:
  """Shapes of arrays, or of what stands in their place, by name."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
  return {array_name(path): list(x.shape) for path, x in leaves}


def differences(saved: Mapping[str, Any], expected: Mapping[str, Any], hint: str = '') -> list[str]:
  """What differs between what is said of two trees' arrays, in words: three, and how many more.

  Args:
    saved: by name, such as `shapes` gives it.
    expected: the same.
    hint: what more than three may mean.
  """
  names = [n for n in sorted({*saved, *expected}) if saved.get(n) != expected.get(n)]
  shown = [f'{n} is {expected.get(n, "missing")}, there {saved.get(n, "missing")}' for n in names]
  return shown[:3] + ([f'and {len(names) - 3} more arrays{hint}'] if len(names) > 3 else [])


def checksums(arrays: Any) -> dict[str, int]:
  """Sums of the bits of each array, by name: the same on any mesh, different if a bit flips."""
  return {name: int(value) for name, value in jax.device_get(_checksums(arrays)).items()}


def check_values(arrays: Any, metadata: Mapping[str, Any]) -> None:
  """Compares arrays with what was saved.

  Args:
    arrays: a TrainState, or a dict of its fields with some of them.
    metadata: saved with them; T5X's checkpoints have none.

  Raises:
    ValueError: if an array is another.
  """
  found, expected = checksums(arrays), metadata.get('checksums', {})
  wrong = [name for name, value in found.items() if expected.get(name, value) != value]
  if wrong:
    raise ValueError(f'wrong values in {", ".join(wrong[:3])}')


@jax.jit
def _checksums(arrays: Any) -> dict[str, jax.Array]:
  def checksum(x: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
    return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32), dtype=jnp.uint32)

  leaves = jax.tree_util.tree_leaves_with_path(arrays)
  return {array_name(path): checksum(x) for path, x in leaves}
