"""Placement of parameters, optimizer state and batches on a mesh of devices.

Parameters and activations carry logical axis names; rules map these to the axes of a data x model
mesh. Names and meaning are those of T5X's partitioner, without importing it.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.linen import partitioning as nn_partitioning
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvq_t5x import named_arrays
from tvq_t5x.config import TransformerConfig
from tvq_t5x.errors import ConfigError, is_count
from tvq_t5x.models import TransformerVQModel
from tvq_t5x.train_step import TrainState, init_train_state
from tvq_t5x.transformer import DecoderState, Transformer, decoder_state_axes

DATA = 'data'
MODEL = 'model'

LogicalAxisRules = tuple[tuple[str, str | None], ...]

# What T5X's rules lack: bind `standard_logical_axis_rules.additional_rules` to this under T5X.
ADDITIONAL_RULES: LogicalAxisRules = (('code', MODEL), ('single_head', None))

_UNSHARDED = ('relpos_buckets', 'abspos_buckets', 'length', 'layers', 'stack', 'mlp_activations')
_FIELDS = {
  'vocab': 'vocab_size',
  'embed': 'emb_dim',
  'heads': 'num_heads',
  'single_head': 'num_heads',
  'code': 'num_codes',
  'layers': 'num_layers',
}


def standard_logical_axis_rules(
  activation_partitioning_dims: int = 1,
  parameter_partitioning_dims: int = 1,
  additional_rules: Iterable[tuple[str, str | None]] = (),
) -> LogicalAxisRules:
  """Rules equal in effect to T5X's of the same name, and `ADDITIONAL_RULES`.

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
      raise ConfigError(
        f'standard_logical_axis_rules.{name} = {dims!r} is not accepted: give 1 or 2.'
      )
  embed = [('embed', MODEL)] * (activation_partitioning_dims == 2)
  embed += [('embed', DATA)] * (parameter_partitioning_dims == 2)
  return (
    ('batch', DATA),
    *((name, MODEL) for name in ('vocab', 'mlp', 'heads', 'joined_kv')),
    ('kv', None),
    *(embed or [('embed', None)]),
    *((name, None) for name in _UNSHARDED),
    *((name, axis) for name, axis in additional_rules),
    *ADDITIONAL_RULES,
  )


class ArrayInfo(NamedTuple):
  """A row of `Partitioner.describe`."""

  name: str  # Path in the TrainState, such as 'params/token_embedder/embedding'.
  shape: tuple[int, ...]
  dtype: str
  logical_axes: tuple[str | None, ...]  # Of the optimizer state: those of the parameter.
  spec: PartitionSpec
  num_bytes: int
  num_bytes_per_device: int


class StateInfo(NamedTuple):
  """What a TrainState takes: an entry for each array, and totals."""

  rows: tuple[ArrayInfo, ...]
  num_parameters: int
  num_bytes: int
  num_bytes_per_device: int


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
  ):
    """Creates the mesh.

    Args:
      num_partitions: size of the 'model' axis; the other devices share the batch.
      logical_axis_rules: None means `standard_logical_axis_rules()`.
      devices: of the mesh; None means all.

    Raises:
      ConfigError: if num_partitions does not divide the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if not is_count(num_partitions) or len(devices) % num_partitions:
      raise ConfigError(
        f'Partitioner.num_partitions = {num_partitions!r} is not accepted with {len(devices)} '
        f'devices: give one of {_join(_divisors(len(devices)))}.'
      )
    if logical_axis_rules is None:
      logical_axis_rules = standard_logical_axis_rules()
    self.logical_axis_rules: LogicalAxisRules = tuple((a, b) for a, b in logical_axis_rules)
    shape = (len(devices) // num_partitions, num_partitions)
    self.mesh = Mesh(
      mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), (DATA, MODEL)
    )

  def validate(self, config: TransformerConfig, batch_size: int, num_microbatches: int = 1) -> None:
    """Checks that everything divides evenly, compiling nothing.

    Args:
      config: of the model.
      batch_size: sequences of a batch, over all devices and microbatches.
      num_microbatches: parts that are computed one after the other.

    Raises:
      ConfigError: naming each setting that does not fit, and what would.
    """
    self._validate_batch(batch_size, num_microbatches)
    self._validate_parameters(config)

  def _validate_batch(self, batch_size: int, num_microbatches: int) -> None:
    for name, value in (('BATCH_SIZE', batch_size), ('NUM_MICROBATCHES', num_microbatches)):
      if not is_count(value):
        raise ConfigError(f'{name} = {value!r} is not accepted: give a positive integer.')
    data = self.mesh.shape[DATA]
    unit = num_microbatches * data
    if batch_size % unit == 0:
      return
    near = sorted({max(batch_size // unit, 1) * unit, -(-batch_size // unit) * unit})
    message = (
      f'BATCH_SIZE = {batch_size} is not accepted: give a multiple of NUM_MICROBATCHES x data '
      f'axis = {num_microbatches} x {data} = {unit}, such as {_join(near)}'
    )
    if batch_size % data == 0:
      message += f'; or NUM_MICROBATCHES one of {_join(_divisors(batch_size // data))}'
    raise ConfigError(f'{message} ({self._mesh_in_words()}).')

  def _validate_parameters(self, config: TransformerConfig) -> None:
    shapes, axes = _abstract_variables(Transformer(config))
    units = {}  # The field's value has to be a multiple of this.
    for name, names in axes.items():
      for size, axis, mesh_axis in zip(shapes[name].shape, names, self._spec(names), strict=True):
        parts = 1 if mesh_axis is None else self.mesh.shape[mesh_axis]
        if size % parts:
          field = _field_of_axis(config, axis, size)
          # An MLP is a few times as wide as emb_dim, which needs only the factors left over.
          unit = parts // math.gcd(parts, size // getattr(config, field))
          units[field] = math.lcm(unit, units.get(field, 1))
    if units:
      lines = [
        f'TransformerConfig.{field} = {getattr(config, field)} is not accepted: give a multiple '
        f'of {unit}, or another num_partitions (macro NUM_PARTITIONS; {self._mesh_in_words()}).'
        for field, unit in units.items()
      ]
      raise ConfigError('\n'.join(lines))

  def train_state_shardings(self, model: TransformerVQModel) -> TrainState:
    """Shardings of everything that training changes, as a TrainState of them."""
    state, axes = _abstract_train_state(model)
    return jax.tree.map(lambda _, axes: self._sharding(axes), state, axes)

  def abstract_params(self, model: TransformerVQModel) -> Any:
    """Shape, dtype and sharding of each parameter, as a tree of `jax.ShapeDtypeStruct`."""
    shapes, axes = _abstract_variables(model.module)
    params = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding(axes[name]))
      for name, x in shapes.items()
    }
    return traverse_util.unflatten_dict(params, sep='/')

  def for_batch(self, batch_size: int) -> 'Partitioner':
    """This one, or one whose devices all have the batch, if they can't share it evenly."""
    if batch_size % self.mesh.shape[DATA] == 0:
      return self
    whole = copy.copy(self)
    whole.logical_axis_rules = (('batch', None), *self.logical_axis_rules)
    return whole

  def batch_sharding(self) -> NamedSharding:
    """Sharding of arrays whose leading axis is the batch."""
    return self._sharding(('batch',))

  def decoder_state_shardings(self, config: TransformerConfig) -> DecoderState:
    """Shardings of what a model remembers of a batch, as a DecoderState of them."""
    return jax.tree.map(self._sharding, decoder_state_axes(config))

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
      with nn_partitioning.axis_rules(self.logical_axis_rules):
        return fn(*args, **kwargs)

    jitted = jax.jit(
      traced,
      in_shardings=in_shardings,
      out_shardings=out_shardings,
      donate_argnums=donate_argnums,
    )
    return MeshFunction(jitted, self.mesh)

  def init_state(
    self, model: TransformerVQModel, rng: jax.Array, batch_size: int = 1
  ) -> TrainState:
    """The state before the first update, created in place; the same numbers on every mesh.

    Args:
      model: to train.
      rng: key of the parameters.
      batch_size: B, of a model that carries its state on.
    """
    init = functools.partial(init_train_state, model, batch_size=batch_size)
    return self.jit(init, self.replicated(), self.train_state_shardings(model))(rng)

  def describe(self, model: TransformerVQModel, batch_size: int = 1) -> StateInfo:
    """What the TrainState takes on this mesh, compiling nothing; arguments as in `init_state`."""
    state, axes = _abstract_train_state(model, batch_size)

    def info(path, x, names):
      sharding = self._sharding(names)
      return ArrayInfo(
        name=named_arrays.array_name(path),
        shape=x.shape,
        dtype=x.dtype.name,
        logical_axes=tuple(names),
        spec=sharding.spec,
        num_bytes=x.dtype.itemsize * math.prod(x.shape),
        num_bytes_per_device=x.dtype.itemsize * math.prod(sharding.shard_shape(x.shape)),
      )

    infos = jax.tree_util.tree_map_with_path(info, state, axes)
    rows = jax.tree.leaves(infos, is_leaf=lambda x: isinstance(x, ArrayInfo))
    return StateInfo(
      rows=tuple(rows),
      num_parameters=sum(x.size for x in jax.tree.leaves(state.params)),
      num_bytes=sum(row.num_bytes for row in rows),
      num_bytes_per_device=sum(row.num_bytes_per_device for row in rows),
    )

  def _spec(self, axes: Sequence[str | None]) -> PartitionSpec:
    spec = nn_partitioning.logical_to_mesh_axes(tuple(axes), self.logical_axis_rules)
    return spec or PartitionSpec()

  def _sharding(self, axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(self.mesh, self._spec(axes))

  def _mesh_in_words(self) -> str:
    data, model = self.mesh.shape[DATA], self.mesh.shape[MODEL]
    return f'data axis {data} x model axis {model} = {data * model} devices'


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


@functools.lru_cache(maxsize=8)  # Tracing takes a second and more.
def _abstract_variables(module: Transformer) -> tuple[dict[str, Any], dict[str, Any]]:
  """Shapes and logical axes of a module's parameters, each by name."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  variables = jax.eval_shape(module.init, jax.random.key(0), tokens)
  axes = nn_partitioning.get_axis_names(variables['params_axes'])
  axes = {name: tuple(x) for name, x in named_arrays.leaves_of(axes).items()}
  return named_arrays.leaves_of(variables['params']), axes


def _abstract_train_state(
  model: TransformerVQModel, batch_size: int = 1
) -> tuple[TrainState, TrainState]:
  """The TrainState's shapes and, in the same structure, the logical axes of each array."""
  shapes, axes = _abstract_variables(model.module)
  params = traverse_util.unflatten_dict(shapes, sep='/')
  opt_state = jax.eval_shape(model.optimizer.init, params)
  carried = carried_axes = None
  if model.carry_state:
    carried = jax.eval_shape(lambda: model.init_state(batch_size))
    carried_axes = decoder_state_axes(model.config)
  state = TrainState(jax.ShapeDtypeStruct([], jnp.int32), params, opt_state, carried)
  params_axes = traverse_util.unflatten_dict(axes, sep='/')
  opt_axes = optimizer_axes(opt_state, shapes, axes)
  return state, TrainState((), params_axes, opt_axes, carried_axes)


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


def _field_of_axis(config: TransformerConfig, axis: str | None, size: int) -> str:
  """The TransformerConfig field that a parameter's axis gets its size from."""
  if axis == 'mlp':
    return 'value_dim' if config.value_axis == 'mlp' else 'emb_dim'
  if axis == 'kv':
    return 'key_dim' if size == config.key_dim else 'value_dim'
  return _FIELDS[axis]


def _divisors(n: int) -> list[int]:
  return [i for i in range(1, n + 1) if n % i == 0]


def _join(values: Iterable[Any]) -> str:
  return ', '.join(map(str, values))
