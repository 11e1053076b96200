import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as nn_partitioning
from jax.sharding import PartitionSpec as P
from util import small_config, small_model

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network.longvq.longvq import LongVQ
from tvq_t5x.training import optimizers, placement
from tvq_t5x.training.partitioning import Partitioner, own_axis_rules, standard_logical_axis_rules
from tvq_t5x.training.train_state import TrainState, init_train_state

pytestmark = pytest.mark.skipif(
  len(jax.devices('cpu')) < 8, reason='XLA_FLAGS is set in the environment, without 8 CPU devices'
)

# What every name of a parameter or activation, here or in T5X's models, is found together with.
ARRAYS = [
  ('vocab', 'embed'),
  ('embed', 'vocab'),
  ('embed',),
  ('embed', 'mlp'),
  ('mlp', 'embed'),
  ('embed', 'heads', 'kv'),
  ('heads', 'kv', 'embed'),
  ('layers', 'embed', 'joined_kv'),
  ('layers', 'single_head', 'mlp', 'embed'),
  ('heads', 'code', 'kv'),
  ('single_head', 'code', 'kv'),
  ('batch', 'length', 'embed'),
  ('batch', 'length', 'mlp'),
  ('batch', 'length', 'heads', 'kv'),
  ('batch', 'length', 'vocab'),
  ('relpos_buckets', 'abspos_buckets', 'stack', 'mlp_activations'),
]
SIZES = {'vocab_size': 12, 'emb_dim': 8, 'value_dim': 8, 'num_codes': 8}


def cpu_partitioner(num_partitions=1, rules=None, num_devices=8):
  return Partitioner(num_partitions, rules, jax.devices('cpu')[:num_devices])


def specs(rules):
  return [nn_partitioning.logical_to_mesh_axes(names, rules) for names in ARRAYS]


def by_name(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


@pytest.mark.parametrize('activation_dims', [1, 2])
@pytest.mark.parametrize('parameter_dims', [1, 2])
def test_rules_are_those_of_t5x_and_our_own(activation_dims, parameter_dims):
  t5x = pytest.importorskip('t5x.partitioning', reason='T5X is an optional dependency')
  expected = t5x.standard_logical_axis_rules(activation_dims, parameter_dims, own_axis_rules())
  ours = standard_logical_axis_rules(activation_dims, parameter_dims)
  assert dict(ours).keys() == dict(expected).keys()
  assert specs(ours) == specs(expected)


def test_rules_in_one_dimension():
  find = functools.partial(
    nn_partitioning.logical_to_mesh_axes, rules=standard_logical_axis_rules()
  )
  assert find(('vocab', 'embed')) == P('model', None)
  assert find(('layers', 'embed', 'heads', 'kv')) == P(None, None, 'model', None)
  assert find(('single_head', 'code', 'kv')) == P(None, 'model', None)
  assert find(('heads', 'code', 'kv')) == P('model', None, None)
  assert find(('batch', 'length', 'embed')) == P('data', None, None)


def test_rules_in_two_dimensions():
  find = functools.partial(
    nn_partitioning.logical_to_mesh_axes, rules=standard_logical_axis_rules(2, 2)
  )
  assert find(('vocab', 'embed')) == P('model', 'data')
  assert find(('embed',)) == P('model')
  assert find(('batch', 'length', 'embed')) == P('data', None, 'model')
  assert find(('batch', 'length', 'mlp')) == P('data', None, 'model')


def test_additional_rules_override_ours_only():
  rules = standard_logical_axis_rules(additional_rules=[['code', None], ['embed', 'data']])
  assert nn_partitioning.logical_to_mesh_axes(('code', 'embed'), rules) == P(None, None)


def test_rules_in_three_dimensions_are_refused():
  with pytest.raises(ConfigError, match='parameter_partitioning_dims = 3 .* give 1 or 2'):
    standard_logical_axis_rules(1, 3)


@pytest.mark.parametrize('num_partitions', [0, 3, 16, 2.0, True, None])
def test_num_partitions_must_divide_the_devices(num_partitions):
  with pytest.raises(ConfigError) as error:
    cpu_partitioner(num_partitions)
  assert str(error.value) == (
    f'Partitioner.num_partitions = {num_partitions} is not accepted with 8 devices: '
    'give one of 1, 2, 4, 8.'
  )


def test_the_mesh_is_that_of_the_devices():
  mesh = cpu_partitioner(2).mesh
  assert dict(mesh.shape) == {'data': 4, 'model': 2}
  assert set(mesh.devices.flat) == set(jax.devices('cpu'))
  # Neighbours, which are of the same host, share a model.
  assert [device.id for device in mesh.devices[0]] == [0, 1]


def test_a_batch_that_does_not_divide_is_refused():
  config = small_config(**SIZES)
  partitioner = cpu_partitioner(2)
  for batch_size, num_microbatches in [(4, 1), (8, 2), (48, 4), (48, 12)]:
    placement.validate(partitioner, config, batch_size, num_microbatches)
  with pytest.raises(ConfigError) as error:
    placement.validate(partitioner, config, 40, 4)
  assert str(error.value) == (
    'DatasetConfig.batch_size = 40 is not accepted with train.num_microbatches = 4 and data axis 4 '
    'x model axis 2 = 8 devices: give a multiple of 16, such as 32, 48, or one of 1, 2, 5, 10 for '
    'train.num_microbatches.'
  )
  with pytest.raises(ConfigError, match='data axis 4 .*such as 4'):
    placement.validate(partitioner, config, 3, 1)
  with pytest.raises(ConfigError, match='num_microbatches = 0 .* a positive integer'):
    placement.validate(partitioner, config, 4, 0)


@pytest.mark.parametrize(
  ('num_partitions', 'dims', 'fields', 'wrong'),
  [
    (4, 1, {'vocab_size': 11}, {'vocab_size': 4}),
    (4, 1, {'value_dim': 6}, {'value_dim': 4}),
    (4, 1, {'num_codes': 6}, {'num_codes': 4}),
    (4, 1, {'vocab_size': 10, 'num_codes': 5}, {'vocab_size': 4, 'num_codes': 4}),
    (4, 1, {'head_type': 'gated', 'num_heads': 6}, {'num_heads': 4}),
    (4, 1, {'head_type': 'mha', 'num_heads': 2, 'num_codes': 5}, {'num_heads': 4}),
    # MLPs of width 5 x 6 and 4 x 6.
    (4, 1, {'head_type': 'mqa', 'num_heads': 4, 'emb_dim': 6}, {'emb_dim': 4}),
    (4, 1, {'head_type': 'mha', 'num_heads': 4, 'emb_dim': 6}, {}),
    # The rest of 'embed' is over data, or over model where no other axis is.
    (1, 2, {'emb_dim': 12}, {'emb_dim': 8}),
    (4, 2, {'emb_dim': 6}, {'emb_dim': 4}),
    # With heads to shard, neither codes nor values are.
    (4, 1, {'head_type': 'gated', 'num_heads': 4, 'num_codes': 5, 'value_dim': 3}, {}),
    (1, 1, {'vocab_size': 11, 'value_dim': 7, 'num_codes': 5}, {}),
  ],
)
def test_parameters_that_do_not_divide_are_refused(num_partitions, dims, fields, wrong):
  config = small_config(**{**SIZES, **fields})
  partitioner = cpu_partitioner(num_partitions, standard_logical_axis_rules(dims, dims))
  if not wrong:
    placement.validate(partitioner, config, 8)
    return
  with pytest.raises(ConfigError) as error:
    placement.validate(partitioner, config, 8)
  found = set(str(error.value).split('\n'))
  assert found == {
    f'TransformerConfig.{name} = {getattr(config, name)} is not accepted with data axis '
    f'{8 // num_partitions} x model axis {num_partitions} = 8 devices: give a multiple of {unit}, '
    'or another NUM_PARTITIONS.'
    for name, unit in wrong.items()
  }


@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('optimizer', ['adamw', 'lion', 'adafactor'])
def test_the_optimizer_state_lies_where_its_parameters_do(optimizer, scan_layers):
  optimizer = getattr(optimizers, optimizer)(1e-3, weight_decay=1e-2, clip_norm=1.0)
  model = small_model(optimizer, **SIZES, scan_layers=scan_layers)
  shardings = placement.train_state_shardings(cpu_partitioner(2), model)
  state = jax.eval_shape(lambda: init_train_state(model, jax.random.key(0)))
  assert isinstance(shardings, TrainState)
  assert jax.tree.structure(shardings) == jax.tree.structure(state)
  params, opt_state = by_name(state.params), by_name(state.opt_state)
  of_params, of_opt_state = by_name(shardings.params), by_name(shardings.opt_state)
  moments = 0
  for name, x in opt_state.items():
    param = next((p for p in params if name.endswith('/' + p)), None)
    if param is not None and x.shape == params[param].shape:
      assert of_opt_state[name].spec == of_params[param].spec
      moments += 1
    else:
      assert not any(of_opt_state[name].spec)
  assert moments >= len(params) - 2 * model.config.layer_sublayers.count('vq') * (
    1 if scan_layers else model.config.num_layers
  )
  assert shardings.step.spec == P()
  layer = 'layers' if scan_layers else 'layers_0'
  stacked = (None,) if scan_layers else ()
  assert of_params[f'{layer}/attention_0/quantizer/c_sum'].spec == P(*stacked, None, 'model', None)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_factored_moments_have_the_axes_that_are_left(scan_layers):
  fields = {'head_type': 'mha', 'num_heads': 2, 'vocab_size': 130, 'emb_dim': 128}
  model = small_model(optimizers.adafactor(1e-3), **fields, scan_layers=scan_layers)
  rules = standard_logical_axis_rules(1, 2)
  shardings = by_name(placement.train_state_shardings(cpu_partitioner(2, rules), model).opt_state)
  state = jax.eval_shape(lambda: init_train_state(model, jax.random.key(0)))
  shapes = {name: x.shape for name, x in by_name(state.opt_state).items()}

  def found(param):
    names = [name for name in shapes if name.endswith(param)]
    return {
      name.split('/v')[1].split('/')[0]: (shapes[name], shardings[name].spec) for name in names
    }

  assert found('token_embedder/embedding') == {
    '_row': ((128,), P('data')),
    '_col': ((130,), P('model')),
    '': ((1,), P(None)),
  }
  layers, axes = ((2,), (None,)) if scan_layers else ((), ())
  layer = 'layers' if scan_layers else 'layers_0'
  assert found(f'{layer}/mlp/wi/kernel') == {
    '_row': ((*layers, 128), P(*axes, 'data')),
    '_col': ((*layers, 512), P(*axes, 'model')),
    '': ((*layers, 1), P(*axes, None)),
  }


def test_jit_gives_logical_names_the_meaning_of_each_partitioner():
  def constrain(x):
    return nn_partitioning.with_sharding_constraint(2 * x, ('batch', 'embed'))

  x = jnp.ones([8, 8])
  one, two = cpu_partitioner(2), cpu_partitioner(2, standard_logical_axis_rules(2, 1))
  assert one.jit(constrain, None, None)(x).sharding.spec == P('data')
  assert two.jit(constrain, None, None)(x).sharding.spec == P('data', 'model')
  assert cpu_partitioner(4).jit(constrain, None, None)(x).sharding.shard_shape(x.shape) == (4, 8)
  assert jax.jit(constrain)(x).sharding.num_devices == 1


def test_a_batch_lies_on_the_data_axis():
  x = jax.device_put(np.zeros([8, 3]), cpu_partitioner(2).batch_sharding())
  assert x.addressable_shards[0].data.shape == (2, 3)


def test_the_initial_state_is_the_same_on_every_mesh():
  model = small_model(optimizers.adamw(1e-3), **SIZES, scan_layers=True)
  expected = placement.init_state(cpu_partitioner(num_devices=1), model, jax.random.key(3))
  partitioner = cpu_partitioner(2)
  state = placement.init_state(partitioner, model, jax.random.key(3))
  jax.tree.map(np.testing.assert_array_equal, state, expected)
  shardings = placement.train_state_shardings(partitioner, model)
  assert all(
    x.sharding.is_equivalent_to(sharding, x.ndim)
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
  )
  assert state.params['token_embedder']['embedding'].addressable_shards[0].data.shape == (6, 8)

  info = placement.describe(partitioner, model)
  arrays = by_name(state._asdict())
  assert [row.name for row in info.rows] == list(by_name(state))
  assert len(info.rows) == len(arrays)
  assert info.num_parameters == sum(x.size for x in jax.tree.leaves(state.params))
  assert info.num_bytes == sum(x.nbytes for x in arrays.values())
  assert info.num_bytes_per_device == sum(
    x.addressable_shards[0].data.nbytes for x in arrays.values()
  )
  row = next(row for row in info.rows if row.name.endswith('attention_1/quantizer/c_sum'))
  assert row._asdict() == {
    'name': 'params/layers/attention_1/quantizer/c_sum',
    'shape': (2, 1, 8, 4),
    'dtype': 'float32',
    'logical_axes': ('layers', 'single_head', 'code', 'kv'),
    'spec': P(None, None, 'model', None),
    'num_bytes': 2 * 8 * 4 * 4,
    'num_bytes_per_device': 2 * 8 * 4 * 4 // 2,
  }


def test_a_model_too_large_for_this_machine_can_be_described():
  model = small_model(
    optimizers.adamw(1e-3),
    vocab_size=32768,
    emb_dim=8192,
    key_dim=128,
    value_dim=None,
    num_layers=64,
    num_codes=512,
  )
  partitioner = cpu_partitioner(8, standard_logical_axis_rules(1, 2))
  placement.validate(partitioner, model.config, 8)
  info = placement.describe(partitioner, model)
  assert info.num_bytes > 2**39
  assert info.num_bytes_per_device < info.num_bytes / 7


def test_devices_that_share_sequences_have_the_whole_model():
  partitioner = Partitioner(1, None, jax.devices('cpu')[:8], sequence_partitions=4)
  assert dict(partitioner.mesh.shape) == {'data': 2, 'model': 4}
  assert partitioner.sequence_partitions == 4
  assert partitioner.spec(('batch', 'length', 'embed')) == P('data', 'model', None)
  assert partitioner.spec(('batch', 'length', 'vocab')) == P('data', 'model', None)
  rows = placement.describe(partitioner, small_model()).rows
  assert all('model' not in row.spec for row in rows)
  assert cpu_partitioner(4).sequence_partitions == 1


@pytest.mark.parametrize(
  ('length', 'parts'),
  # Blocks of 4; a window of 9 is three of them.
  [(8, '1'), (24, 'one of 1, 2'), (32, 'one of 1, 2'), (40, 'one of 1, 2'), (20, '1')],
)
def test_a_part_is_whole_blocks_and_no_shorter_than_the_window(length, parts):
  partitioner = Partitioner(1, None, jax.devices('cpu')[:8], sequence_partitions=4)
  config = small_config(window_len=9)
  with pytest.raises(
    ConfigError, match=f'segments of {length} .* give {parts}, or .* multiple of 16 .* 48'
  ):
    placement.validate_length(partitioner, config, length)
  placement.validate_length(partitioner, config, 48)
  placement.validate_length(cpu_partitioner(4), config, length)


def test_messages_tell_which_sublayers_and_axes_are_meant():
  partitioner = Partitioner(1, None, jax.devices('cpu')[:8], sequence_partitions=4)
  quadratic = functools.partial(LongVQ, attention='quadratic')
  config = small_config(sublayers=(quadratic, 'mlp'))
  with pytest.raises(ConfigError, match=r'LongVQ \(attention = quadratic\), whose positions'):
    placement.validate(partitioner, config, 8)
  with pytest.raises(ConfigError, match='data axis 2 x sequence axis 4 = 8 devices'):
    placement.validate(partitioner, small_config(), 3)


def test_activations_that_devices_share_otherwise_are_refused():
  rules = standard_logical_axis_rules(activation_partitioning_dims=2)
  with pytest.raises(ConfigError, match='activation_partitioning_dims = 2 .* 1 with SEQUENCE_PART'):
    Partitioner(1, rules, jax.devices('cpu')[:8], sequence_partitions=4)
