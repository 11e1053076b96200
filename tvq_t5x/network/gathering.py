"""The whole of a kernel, on devices that share the batch and the parameters."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.linen import partitioning as nn_partitioning
from jax.sharding import Mesh, PartitionSpec

from tvq_t5x.network import sequence

# Of more devices of a network with three axes, the TPU compiler gathers an array as the sum of all
# parts between zeros: that sends twice the bytes, and writes the array twice.
_MOST_DEVICES = 32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gather(axes: tuple[str, ...], kernel: jax.Array) -> jax.Array:
  """The whole kernel on each device, where devices share it by its 'embed' axis.

  Said here, it is one collective a kernel, or one of each of `steps_of`, of the product's dtype;
  some compilers would else pass the parts around step by step within each product. The sum of the
  gradient, which is shared out again, is one.

  Args:
    axes: logical axis names of the kernel.
    kernel: of a projection, or of a table.

  Returns:
    The same array, whose other axes are shared out as the rules say.
  """
  mesh, names = sequence.mesh(), nn_partitioning.logical_to_mesh_axes(axes)
  if mesh is None or not names or 'embed' not in axes:
    return _whole(axes, kernel)
  at = axes.index('embed')
  name = names[at]
  if not isinstance(name, str) or kernel.shape[at] % mesh.shape[name]:
    return _whole(axes, kernel)
  steps = steps_of(mesh, name)
  return _whole(axes, kernel if len(steps) == 1 else in_steps(kernel, at, mesh, name, steps))


def _whole(axes: tuple[str, ...], kernel: jax.Array) -> jax.Array:
  return sequence.constrain(kernel, [None if x == 'embed' else x for x in axes])


gather.defvjp(
  lambda axes, kernel: (gather(axes, kernel), None),
  lambda axes, _, g: (sequence.constrain(_whole(axes, g), axes),),
)


def steps_of(mesh: Mesh, name: str) -> tuple[int, ...]:
  """The sizes of the groups of devices that gather an array one after the other.

  Args:
    mesh: of the program.
    name: of the axis whose n devices share the array.

  Returns:
    Sizes whose product is n: neighbors on a line of the network come first, again while too many
    devices are left.
  """
  at = mesh.axis_names.index(name)
  devices = np.moveaxis(mesh.devices, at, -1).reshape(-1, mesh.shape[name])[0]
  places = np.array([getattr(device, 'coords', ()) for device in devices])  # [n, 3] of TPUs.
  if sum(len(set(place)) > 1 for place in places.T) < 3:
    return (len(devices),)
  steps = []
  while len(places) > _MOST_DEVICES:
    line = _line(places)
    if line == 1 or len(places) % line:
      break
    steps.append(line)
    places = places[::line]
  return (*steps, len(places))


def _line(places: np.ndarray) -> int:
  """How many of the places, from the first one on, differ in one coordinate only."""
  differs = places != places[0]  # [n, 3]
  line = 1
  while line < len(places) and np.count_nonzero(differs[: line + 1].any(axis=0)) == 1:
    line += 1
  return line


def in_steps(x: jax.Array, at: int, mesh: Mesh, name: str, steps: Sequence[int]) -> jax.Array:
  """Gathers an array whose parts lie on the devices of an axis of the mesh.

  Args:
    x: of which each device has a part.
    at: the axis of x that is shared out.
    mesh: of the program.
    name: of the mesh's axis.
    steps: sizes of the groups that gather it one after the other; their product is the axis's.

  Returns:
    x, whole along that axis.
  """
  order = np.arange(mesh.shape[name]).reshape(*reversed(steps))

  def local(part: jax.Array) -> jax.Array:
    for i, size in enumerate(steps):
      groups: Any = np.moveaxis(order, -1 - i, -1).reshape(-1, size).tolist()
      part = jax.lax.all_gather(part, name, axis=at, tiled=True, axis_index_groups=groups)
    return part

  mapped = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=PartitionSpec(*[None] * at, name),
    out_specs=PartitionSpec(),
    axis_names={name},
    check_vma=False,
  )
  return mapped(x)
