"""A mesh of devices, and the rules that place arrays on it.

Parameters and activations carry logical axis names; rules map these to the axes of a data x model
mesh. Names and meaning are those of T5X's partitioner, without importing it.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax.linen import partitioning as nn_partitioning
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvq_t5x.common.errors import ConfigError, is_count
from tvq_t5x.network import sequence

DATA = 'data'
MODEL = 'model'

LogicalAxisRules = tuple[tuple[str, str | None], ...]

_OF_MODEL = ('vocab', 'mlp', 'heads', 'joined_kv')
_UNSHARDED = ('relpos_buckets', 'abspos_buckets', 'length', 'layers', 'stack', 'mlp_activations')


def own_axis_rules() -> LogicalAxisRules:
  """What T5X's rules lack: under T5X, its `standard_logical_axis_rules.additional_rules`."""
  return (('code', MODEL), ('single_head', None), ('modes', None), ('classes', None))


def standard_logical_axis_rules(
  activation_partitioning_dims: int = 1,
  parameter_partitioning_dims: int = 1,
  additional_rules: Iterable[tuple[str, str | None]] = (),
) -> LogicalAxisRules:
  """Rules equal in effect to T5X's of the same name, and `own_axis_rules`.

  Args:
    activation_partitioning_dims: 2 also shards the activations' 'embed' axis over 'model'.
    parameter_partitioning_dims: 2 also shards the parameters' 'embed' axis over 'data'.
    additional_rules: come after T5X's, which they cannot override, and before our own.

  Returns:
    Pairs of a logical axis and a mesh axis or None. Earlier rules win, and a rule whose mesh axis
    another axis of the array has taken is passed over.

  Raises:
    ConfigError: if a number of dimensions is neither 1 nor 2.
  """
  for name, dims in (
    ('activation_partitioning_dims', activation_partitioning_dims),
    ('parameter_partitioning_dims', parameter_partitioning_dims),
  ):
    if dims not in (1, 2):
      raise ConfigError(f'standard_logical_axis_rules.{name}', dims, '1 or 2')
  embed = [('embed', MODEL)] * (activation_partitioning_dims == 2)
  embed += [('embed', DATA)] * (parameter_partitioning_dims == 2)
  return (
    ('batch', DATA),
    *((name, MODEL) for name in _OF_MODEL),
    ('kv', None),
    *(embed or [('embed', None)]),
    *((name, None) for name in _UNSHARDED),
    *((name, axis) for name, axis in additional_rules),
    *own_axis_rules(),
  )


def sequence_axis_rules(
  rules: Iterable[tuple[str, str | None]], sequence_partitions: int = 1
) -> LogicalAxisRules:
  """Rules by which the devices of the 'model' axis share each sequence, in place of the model.

  Args:
    rules: ours, or T5X's with `own_axis_rules`.
    sequence_partitions: devices that share a sequence, see `model_axis_size`; 1 changes nothing.

  Returns:
    The rules, after those for sequences, which win.

  Raises:
    ConfigError: if the rules share out what each device has to have of its positions.
  """
  rules = tuple((name, axis) for name, axis in rules)
  if sequence_partitions == 1:
    return rules
  if ('embed', MODEL) in rules:
    raise ConfigError(
      'standard_logical_axis_rules.activation_partitioning_dims',
      2,
      f'1 with SEQUENCE_PARTITIONS = {sequence_partitions}',
    )
  whole = (*_OF_MODEL, *(name for name, axis in own_axis_rules() if axis == MODEL))
  return (('length', MODEL), *((name, None) for name in whole), *rules)


def model_axis_size(num_partitions: int = 1, sequence_partitions: int = 1) -> int:
  """Devices of the 'model' axis, which share the model or sequences.

  Args:
    num_partitions: that share the model.
    sequence_partitions: that share each sequence.

  Raises:
    ConfigError: if neither is 1, or one is no number of devices.
  """
  sizes = {'NUM_PARTITIONS': num_partitions, 'SEQUENCE_PARTITIONS': sequence_partitions}
  for name, value in sizes.items():
    if not is_count(value):
      raise ConfigError(name, value, 'a whole number of devices, at least 1')
  if num_partitions > 1 and sequence_partitions > 1:
    raise ConfigError(
      'SEQUENCE_PARTITIONS',
      sequence_partitions,
      '1, or NUM_PARTITIONS = 1: devices share the model or the sequences',
      problem=f'is not accepted with NUM_PARTITIONS = {num_partitions}',
    )
  return max(num_partitions, sequence_partitions)


class Partitioner:
  """A data x model mesh and the rules that place arrays on it.

  Attributes:
    mesh: with axes 'data' and 'model'.
    logical_axis_rules: pairs of a logical axis and a mesh axis or None.
  """

  def __init__(
    self,
    num_partitions: int = 1,
    logical_axis_rules: Iterable[tuple[str, str | None]] | None = None,
    devices: Sequence[jax.Device] | None = None,
    sequence_partitions: int = 1,
  ):
    """Creates the mesh.

    Args:
      num_partitions: devices that share the model, on the 'model' axis; the others share the batch.
      logical_axis_rules: None means `standard_logical_axis_rules()`.
      devices: of the mesh; None means all.
      sequence_partitions: devices that share each sequence, in place of the model.

    Raises:
      ConfigError: if a number of partitions does not divide the number of devices, or neither is 1.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {'num_partitions': num_partitions, 'sequence_partitions': sequence_partitions}
    for name, size in sizes.items():
      if not is_count(size) or len(devices) % size:
        raise ConfigError(
          f'Partitioner.{name}',
          size,
          f'one of {_join(_divisors(len(devices)))}',
          problem=f'is not accepted with {len(devices)} devices',
        )
    if logical_axis_rules is None:
      logical_axis_rules = standard_logical_axis_rules()
    size = model_axis_size(num_partitions, sequence_partitions)
    self.logical_axis_rules = sequence_axis_rules(logical_axis_rules, sequence_partitions)
    shape = (len(devices) // size, size)
    self.mesh = Mesh(
      mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), (DATA, MODEL)
    )

  def validate_batch(self, batch_size: int, num_microbatches: int = 1) -> None:
    """Refuses sizes that the mesh can't share out evenly.

    Args:
      batch_size: sequences of a batch, over all devices and microbatches.
      num_microbatches: parts that are computed one after the other.

    Raises:
      ConfigError: naming the setting that does not fit, and what would.
    """
    size, parts = 'DatasetConfig.batch_size', 'train.num_microbatches'
    for name, value in ((size, batch_size), (parts, num_microbatches)):
      if not is_count(value):
        raise ConfigError(name, value, 'a positive integer')
    data = self.mesh.shape[DATA]
    unit = num_microbatches * data
    if batch_size % unit == 0:
      return
    near = sorted({max(batch_size // unit, 1) * unit, -(-batch_size // unit) * unit})
    accepted = f'a multiple of {unit}, such as {_join(near)}'
    if batch_size % data == 0:
      accepted += f', or one of {_join(_divisors(batch_size // data))} for {parts}'
    elif batch_size < data:
      accepted += ', or SEQUENCE_PARTITIONS: devices that share each sequence'
    problem = f'is not accepted with {parts} = {num_microbatches} and {self.mesh_in_words()}'
    raise ConfigError(size, batch_size, accepted, problem)

  @property
  def sequence_partitions(self) -> int:
    """How many devices share each sequence."""
    return self.mesh.shape[MODEL] if self.spec(('length',)) == PartitionSpec(MODEL) else 1

  def for_batch(self, batch_size: int) -> 'Partitioner':
    """This one, or one whose devices all have the batch, if they can't share it evenly."""
    if batch_size % self.mesh.shape[DATA] == 0:
      return self
    whole = copy.copy(self)
    whole.logical_axis_rules = (('batch', None), *self.logical_axis_rules)
    return whole

  def batch_sharding(self) -> NamedSharding:
    """Sharding of arrays whose leading axis is the batch."""
    return self.sharding(('batch',))

  def replicated(self) -> NamedSharding:
    """Sharding of arrays that every device has as a whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  def jit(
    self,
    fn: Callable[..., Any],
    in_shardings: Any,
    out_shardings: Any,
    donate_argnums: int | Sequence[int] = (),
  ) -> 'MeshFunction':
    """`jax.jit` that gives the logical axis names inside `fn` their meaning on this mesh.

    Args:
      fn: to compile.
      in_shardings: trees of shardings for prefixes of the arguments; None takes an argument as it
        comes.
      out_shardings: likewise for the result; None leaves it to the compiler.
      donate_argnums: arguments whose memory the results may take.

    Returns:
      The function, which also has `lower`.
    """

    # A function of its own: JAX would else reuse what `fn` was traced to under other rules.
    @functools.wraps(fn)
    def traced(*args, **kwargs):
      rules = self.logical_axis_rules
      with nn_partitioning.axis_rules(rules), sequence.shared_by(self.mesh, rules):
        return fn(*args, **kwargs)

    jitted = jax.jit(
      traced,
      in_shardings=in_shardings,
      out_shardings=out_shardings,
      donate_argnums=donate_argnums,
    )
    return MeshFunction(jitted, self.mesh)

  def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes."""
    spec = nn_partitioning.logical_to_mesh_axes(tuple(axes), self.logical_axis_rules)
    return spec or PartitionSpec()

  def sharding(self, axes: Sequence[str | None]) -> NamedSharding:
    """Sharding of an array with these logical axes."""
    return NamedSharding(self.mesh, self.spec(axes))

  def axes_in_words(self, noun: str = '') -> str:
    """The mesh's axes, by what their devices share, such as 'data 4 x model 2'."""
    shared = 'sequence' if self.sequence_partitions > 1 else MODEL
    return f'{DATA}{noun} {self.mesh.shape[DATA]} x {shared}{noun} {self.mesh.shape[MODEL]}'

  def mesh_in_words(self) -> str:
    """The mesh, for messages."""
    return f'{self.axes_in_words(" axis")} = {self.mesh.size} devices'


@dataclasses.dataclass(frozen=True)
class MeshFunction:
  """A function from `jax.jit`, called with a mesh in context."""

  jitted: jax.stages.Wrapped
  mesh: Mesh

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the function."""
    with jax.set_mesh(self.mesh):
      return self.jitted(*args, **kwargs)

  def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
    """Lowers the function for arrays or `jax.ShapeDtypeStruct`s, to compile ahead of time."""
    with jax.set_mesh(self.mesh):
      return self.jitted.lower(*args, **kwargs)


def _divisors(n: int) -> list[int]:
  return [i for i in range(1, n + 1) if n % i == 0]


def _join(values: Iterable[Any]) -> str:
  return ', '.join(map(str, values))
