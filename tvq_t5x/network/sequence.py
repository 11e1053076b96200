"""Sequence parallelism: a sequence on many devices, each with a part of its positions.

What mixes no positions is left to the compiler, which follows the sharding of activations. What
mixes them says here what devices exchange: sums of what is constant in size, and a few positions of
the part before. Letters besides those of `config`: P parts of T / P positions, in order.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from jax.sharding import Mesh, PartitionSpec

from tvq_t5x.network import xla

X = TypeVar('X')


class Sharing(NamedTuple):
  """Devices that share a batch, or its sequences."""

  mesh: Mesh
  batch: str | None  # The axis of the mesh that shares the batch, if any.
  length: str | None  # The one that shares each sequence, if any.


# A user's context, not an argument, since it changes where numbers are computed and no number.
_sharing: Any = jax.make_user_context(None)


def shared_by(mesh: Mesh, rules: Sequence[tuple[str, str | None]]) -> Any:
  """A context: what is traced in it shares rows and sequences out as the rules say.

  Args:
    mesh: of the program.
    rules: pairs of a logical axis and a mesh axis or None.
  """
  batch, length = (_mesh_axis(name, rules) for name in ('batch', 'length'))
  if length is not None and mesh.shape[length] == 1:
    length = None
  return _sharing(Sharing(mesh, batch, length))


def mesh() -> Mesh | None:
  """The mesh of the program that is traced in `shared_by`."""
  return None if _sharing.value is None else _sharing.value.mesh


def _mesh_axis(name: str, rules: Sequence[tuple[str, str | None]]) -> str | None:
  return next((axis for rule, axis in rules if rule == name), None)


def num_parts(length: int, least: int = 1, unit: int = 1) -> int:
  """P of a sequence of T positions; 1 where it is not shared out.

  Args:
    length: T.
    least: positions that a part needs, as many as it takes from the one before it.
    unit: what the positions of a part are a multiple of.
  """
  sharing = _sharing.value
  if sharing is None or sharing.length is None:
    return 1
  parts = sharing.mesh.shape[sharing.length]
  fits = length % parts == 0 and length // parts >= least and length // parts % unit == 0
  return parts if fits else 1


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """`with_sharding_constraint` by logical axes, whose 'length' is shared out where it divides."""
  if 'length' in axes and num_parts(x.shape[list(axes).index('length')]) == 1:
    axes = [None if name == 'length' else name for name in axes]
  return nn_partitioning.with_sharding_constraint(x, tuple(axes))


class Part(NamedTuple):
  """What a function of `on_parts` knows of its place, and how it exchanges something."""

  axis: str
  number: int  # P.
  index: jax.Array  # [] int32, 0 to P - 1.
  backwards: bool = False  # Whether the last one comes first.

  @property
  def mirrored(self) -> 'Part':
    """The same part, counted from the other end."""
    return self._replace(index=self.number - 1 - self.index, backwards=not self.backwards)

  def from_previous(self, first: X, x: X) -> X:
    """What the part before has as `x`; the first part has `first`."""
    moved = jax.tree.map(lambda leaf: self._moved(leaf, 1), x)
    return jax.tree.map(lambda a, b: jnp.where(self.index == 0, a, b), first, moved)

  def before_each(self, first: X, x: X, merge: Callable[[X, X, int], X]) -> X:
    """What comes before each part, in log P exchanges: `first`, merged with all earlier `x`.

    Args:
      first: before the first part; the same on all devices.
      x: of each part.
      merge: of what comes before n parts, and of these, with n; associative.
    """
    total, reach = self.from_previous(first, x), 1
    while reach < self.number:
      earlier = jax.tree.map(functools.partial(self._moved, by=reach), total)
      merged = merge(earlier, total, reach)
      inside = self.index >= reach
      total = jax.tree.map(lambda a, b, own=inside: jnp.where(own, a, b), merged, total)
      reach *= 2
    return total

  def ends(
    self, lengths: jax.Array | None, part_len: int
  ) -> tuple[jax.Array | int, jax.Array | None]:
    """Where sequences end, of which only some positions count.

    Args:
      lengths: [B] int32, how many of each row count; None means all.
      part_len: positions of a part.

    Returns:
      The part that has the last one, of each row [B] or of all, and how many count in this part,
      [B] int32 or None.
    """
    if lengths is None:
      return self.number - 1, None
    owner = jnp.maximum(-(-lengths // part_len) - 1, 0)
    return owner, jnp.clip(lengths - self.index * part_len, 0, part_len)

  def of_owner(self, owner: jax.Array | int, x: X) -> X:
    """What one part has as `x` [B, ...], for all; of each row that of its owner [B], or one."""

    def select(leaf):
      mine = jnp.asarray(self.index == owner)
      mine = mine.reshape(mine.shape + (1,) * (leaf.ndim - mine.ndim))
      return jax.lax.psum(jnp.where(mine, leaf, jnp.zeros_like(leaf)), self.axis)

    return jax.tree.map(select, x)

  def _moved(self, x: jax.Array, by: int) -> jax.Array:
    """To each part what another one has, which comes earlier; zero where there is none."""
    pairs = [(i, i + by) for i in range(self.number - by)]
    if self.backwards:
      pairs = [(self.number - 1 - i, self.number - 1 - j) for i, j in pairs]
    return jax.lax.ppermute(x, self.axis, pairs)


def on_rows(function: Callable[..., Any], rows: Any, shared: Any) -> Any:
  """Calls a function with the rows that each device has, where devices share nothing else.

  Args:
    function: of `rows` and `shared`; returns arrays [B, ...], of each row from that row alone.
    rows: arrays [B, ...].
    shared: arrays without axes of the batch.

  Returns:
    What the function returns.
  """
  sharing, batch_size = _sharing.value, jax.tree.leaves(rows)[0].shape[0]
  if sharing is None or sharing.batch is None:
    return function(rows, shared)
  devices = sharing.mesh.shape[sharing.batch]
  if devices == 1 or devices < sharing.mesh.size or batch_size % devices:
    return function(rows, shared)
  of_rows = PartitionSpec(sharing.batch)
  mapped = jax.shard_map(
    function,
    mesh=sharing.mesh,
    in_specs=(of_rows, PartitionSpec()),
    out_specs=of_rows,
    axis_names={sharing.batch},  # Of others, gradients would be summed over one device each.
    check_vma=False,
  )
  return mapped(rows, shared)


def row_major(x: jax.Array) -> jax.Array:
  """`xla.row_major` of the rows [B, ...] that each device has."""
  if xla.platform() != 'tpu':
    return x
  return on_rows(lambda x, _: xla.row_major(x), x, ())


def on_parts(
  function: Callable[..., Any], sequences: Any, states: Any, shared: Any
) -> tuple[Any, Any]:
  """Calls a function with one part of each sequence, on all devices that share them.

  Args:
    function: of a `Part`, of its positions of `sequences`, `states` and `shared`. Returns arrays
      [B, T / P, ...], and states after the sequences, the same of all parts.
    sequences: arrays [B, T, ...], P of which `num_parts` found.
    states: arrays [B, ...] of whole sequences.
    shared: arrays without axes of the batch or of positions.

  Returns:
    Arrays [B, T, ...], and the states.
  """
  sharing = _sharing.value
  assert sharing is not None  # So `num_parts` found.
  batch, length, mesh = sharing.batch, sharing.length, sharing.mesh
  batch_size = jax.tree.leaves(sequences)[0].shape[0]
  if batch is not None and batch_size % mesh.shape[batch]:
    batch = None
  of_sequence, of_row = PartitionSpec(batch, length), PartitionSpec(batch)

  def local(sequences, states, shared):
    part = Part(length, mesh.shape[length], jax.lax.axis_index(length))
    return function(part, sequences, states, shared)

  mapped = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(of_sequence, of_row, PartitionSpec()),
    out_specs=(of_sequence, of_row),
    check_vma=False,
  )
  return mapped(sequences, states, shared)
