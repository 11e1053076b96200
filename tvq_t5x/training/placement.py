"""Where the arrays of a model lie: parameters, what training changes, the state of sequences."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.linen import partitioning as nn_partitioning
from jax.sharding import PartitionSpec

from tvq_t5x.common import named_arrays
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network import sublayers
from tvq_t5x.network.classifier import Classifier
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.mixers import Mixer
from tvq_t5x.network.transformer import DecoderState, Transformer, decoder_state_axes
from tvq_t5x.training.base_model import Model
from tvq_t5x.training.optimizer_axes import optimizer_axes
from tvq_t5x.training.partitioning import Partitioner
from tvq_t5x.training.train_state import TrainState, init_train_state

_SEQUENCE_PARTITIONS = 'SEQUENCE_PARTITIONS'
_FIELDS = {
  'vocab': 'vocab_size',
  'embed': 'emb_dim',
  'heads': 'num_heads',
  'single_head': 'num_heads',
  'code': 'num_codes',
  'layers': 'num_layers',
}


class ArrayInfo(NamedTuple):
  """A row of `describe`."""

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


def validate(
  partitioner: Partitioner, config: TransformerConfig, batch_size: int, num_microbatches: int = 1
) -> None:
  """Checks that everything divides evenly, compiling nothing.

  Args:
    partitioner: of the mesh.
    config: of the model.
    batch_size: sequences of a batch, over all devices and microbatches.
    num_microbatches: parts that are computed one after the other.

  Raises:
    ConfigError: naming each setting that does not fit, and what would.
  """
  partitioner.validate_batch(batch_size, num_microbatches)
  if partitioner.sequence_partitions > 1:
    _validate_sublayers(partitioner, config)
  _validate_parameters(partitioner, config)


def validate_length(partitioner: Partitioner, config: TransformerConfig, length: int) -> None:
  """Checks that devices can share sequences, compiling nothing.

  Args:
    partitioner: of the mesh.
    config: of the model.
    length: tokens of a sequence that are held at once.

  Raises:
    ConfigError: naming the setting that does not fit, and what would.
  """
  parts, c = partitioner.sequence_partitions, config
  least = -(-c.window_len // c.block_len) * c.block_len
  if parts == 1 or (length % (parts * c.block_len) == 0 and length >= parts * least):
    return
  accepted = [n for n in range(1, length // least + 1) if length % (n * c.block_len) == 0] or [1]
  one_of = f'one of {", ".join(map(str, accepted))}' if len(accepted) > 1 else str(accepted[0])
  raise ConfigError(
    _SEQUENCE_PARTITIONS,
    parts,
    f'{one_of}, or segments (SEGMENT_LEN, else UPDATE_LEN, else '
    f'TASK_FEATURE_LENGTHS) of a multiple of {parts * c.block_len} tokens, at least '
    f'{parts * least}',
    problem=f'is not accepted with segments of {length} tokens: a part is whole blocks of '
    f'TransformerConfig.block_len = {c.block_len} and at least TransformerConfig.window_len = '
    f'{c.window_len} tokens',
  )


def _validate_sublayers(partitioner: Partitioner, config: TransformerConfig) -> None:
  for sublayer in sublayers.of_layer(config):
    mixer = sublayer.mixer
    if not mixer.shares_sequences:
      raise ConfigError(
        _SEQUENCE_PARTITIONS,
        partitioner.sequence_partitions,
        '1',
        problem=f'is not accepted with {_in_words(mixer)}, whose positions lie on one device',
      )


def _in_words(mixer: Mixer) -> str:
  """Its class and what it is set to, such as 'LongVQ (attention = quadratic)'."""
  changed = [f'{name} = {x}' for name, x in sublayers.changed_settings(mixer).items()]
  name = type(mixer).__name__
  return f'{name} ({", ".join(changed)})' if changed else name


def _validate_parameters(partitioner: Partitioner, config: TransformerConfig) -> None:
  shapes, axes = _abstract_variables(
    Classifier(config, num_classes=1) if config.bidirectional else Transformer(config)
  )
  units = {}  # The field's value has to be a multiple of this.
  for name, names in axes.items():
    for size, axis, mesh_axis in zip(
      shapes[name].shape, names, partitioner.spec(names), strict=True
    ):
      parts = 1 if mesh_axis is None else partitioner.mesh.shape[mesh_axis]
      if size % parts:
        field = _field_of_axis(config, axis, size)
        # An MLP is a few times as wide as emb_dim, which needs only the factors left over.
        unit = parts // math.gcd(parts, size // _value(config, field))
        units[field] = math.lcm(unit, units.get(field, 1))
  if units:
    problems = [
      ConfigError(
        f'TransformerConfig.{field}',
        _value(config, field),
        f'a multiple of {unit}, or another NUM_PARTITIONS',
        problem=f'is not accepted with {partitioner.mesh_in_words()}',
      )
      for field, unit in units.items()
    ]
    raise ConfigError('\n'.join(map(str, problems)))


def train_state_shardings(partitioner: Partitioner, model: Model) -> TrainState:
  """Shardings of everything that training changes, as a TrainState of them."""
  state, axes = _abstract_train_state(model)
  return jax.tree.map(lambda _, axes: partitioner.sharding(axes), state, axes)


def abstract_params(partitioner: Partitioner, model: Model) -> Any:
  """Shape, dtype and sharding of each parameter, as a tree of `jax.ShapeDtypeStruct`."""
  shapes, axes = _abstract_variables(model.module)
  params = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=partitioner.sharding(axes[name]))
    for name, x in shapes.items()
  }
  return traverse_util.unflatten_dict(params, sep='/')


def decoder_state_shardings(partitioner: Partitioner, config: TransformerConfig) -> DecoderState:
  """Shardings of what a model remembers of a batch, as a DecoderState of them."""
  return jax.tree.map(partitioner.sharding, decoder_state_axes(config))


def init_state(
  partitioner: Partitioner, model: Model, rng: jax.Array, batch_size: int = 1
) -> TrainState:
  """The state before the first update, created in place; the same numbers on every mesh.

  Args:
    partitioner: places it.
    model: to train.
    rng: key of the parameters.
    batch_size: B, of a model that carries its state on.
  """
  init = functools.partial(init_train_state, model, batch_size=batch_size)
  return partitioner.jit(init, partitioner.replicated(), train_state_shardings(partitioner, model))(
    rng
  )


def describe(partitioner: Partitioner, model: Model, batch_size: int = 1) -> StateInfo:
  """What the TrainState takes on this mesh, compiling nothing; arguments as in `init_state`."""
  state, axes = _abstract_train_state(model, batch_size)

  def info(path, x, names):
    sharding = partitioner.sharding(names)
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


@functools.lru_cache(maxsize=8)  # Tracing takes a second and more.
def _abstract_variables(module: Transformer | Classifier) -> tuple[dict[str, Any], dict[str, Any]]:
  """Shapes and logical axes of a module's parameters, each by name."""
  variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *module.example_inputs(1)))
  axes = nn_partitioning.get_axis_names(variables['params_axes'])
  axes = {name: tuple(x) for name, x in named_arrays.leaves_of(axes).items()}
  return named_arrays.leaves_of(variables['params']), axes


def _abstract_train_state(model: Model, batch_size: int = 1) -> tuple[TrainState, TrainState]:
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


def _field_of_axis(config: TransformerConfig, axis: str | None, size: int) -> str:
  """The TransformerConfig field that a parameter's axis gets its size from."""
  if axis == 'mlp':
    if config.value_axis == 'mlp' and size == config.value_width:
      return 'value_dim'
    return 'mlp_dim' if config.mlp_dim is not None and size == config.mlp_dim else 'emb_dim'
  if axis == 'kv':
    return 'key_dim' if size == config.key_dim else 'value_dim'
  return _FIELDS.get(str(axis), 'emb_dim')


def _value(config: TransformerConfig, field: str) -> int:
  """The size that a field stands for, where it is not given too."""
  return config.value_width if field == 'value_dim' else getattr(config, field)
