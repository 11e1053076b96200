"""Logical axes of an optimizer's state, found by the names of the parameters in it."""

from collections.abc import Mapping
from typing import Any

import jax

from tvq_t5x.common import named_arrays


def optimizer_axes(
  opt_state: Any, shapes: Mapping[str, Any], axes: Mapping[str, tuple[str | None, ...]]
) -> Any:
  """Logical axes of the arrays in an optimizer's state: those of the parameter each belongs to.

  Args:
    opt_state: of any optax transformation; leaves have a shape.
    shapes: the parameters by name ('layers/attention_0/key/kernel').
    axes: their logical axes, by name.

  Returns:
    A tuple of logical axes in the place of each array, (None, ...) where it belongs to none.
  """

  def axes_of(path, x):
    # Optimizers keep trees like that of the parameters, deep inside their own state.
    keys = named_arrays.array_name(path).split('/')
    suffixes = ('/'.join(keys[i:]) for i in range(len(keys)))
    name = next((suffix for suffix in suffixes if suffix in axes), None)
    return (None,) * x.ndim if name is None else _reduced(axes[name], shapes[name].shape, x.shape)

  return jax.tree_util.tree_map_with_path(axes_of, opt_state)


def _reduced(
  axes: tuple[str | None, ...], shape: tuple[int, ...], reduced: tuple[int, ...]
) -> tuple[str | None, ...]:
  """Axes of an array with a parameter's shape or, as Adafactor's factors, one axis less of it."""
  if reduced == shape:
    return axes
  found = {
    axes[:i] + axes[i + 1 :]
    for i in range(len(shape))
    # Factors are per layer.
    if axes[i] != 'layers' and shape[:i] + shape[i + 1 :] == reduced
  }
  return found.pop() if len(found) == 1 else (None,) * len(reduced)
