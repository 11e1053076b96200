"""T5X's partitioner on data x model meshes: every device has its part, and no number changes."""

import jax
import numpy as np
import pytest

pytest.importorskip('t5x.train', reason='T5X is not installed: its partitioning')

import t5x_runs
from jax.sharding import NamedSharding, PartitionSpec
from mesh_util import TOLERANCE, by_name, shard_shapes
from small_runs import Run, assert_same, make_model
from t5x import utils

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
DIMS = [(1, 1), (1, 2), (2, 1), (2, 2)]  # Of activations and of parameters.


def expected_shapes(shape, dims):
  """What a device has of a parameter of each kind."""
  data, model = shape
  # Of parameters with an axis on 'model', in two dimensions the other one is on 'data'; what would
  # be whole on every device is on the axis that is left for it.
  other = data if dims[1] == 2 else 1
  alone = model if dims[0] == 2 else other
  return {
    'token_embedder/embedding': (32 // model, 32 // other),
    'logits/dense/kernel': (32 // other, 32 // model),
    'layers_0/attention_0/norm/scale': (32 // alone,),
    'layers_0/attention_0/gate/kernel': (32 // other, 1, 64 // model),
    'layers_0/attention_0/value/kernel': (32 // other, 1, 64 // model),
    'layers_0/attention_0/out/kernel': (1, 64 // model, 32 // other),
    'layers_0/attention_0/key/kernel': (32 // alone, 1, 16),
    'layers_0/attention_0/quantizer/c_sum': (1, 16 // model, 16),
    'layers_0/attention_0/quantizer/c_count': (1, 16 // model),
    'layers_0/attention_0/content_bias': (1, 16),
  }


def assert_sharded(shapes, shape, dims):
  """Parameters as expected, and the moments of each where the parameter itself is."""
  for param, expected in expected_shapes(shape, dims).items():
    assert shapes[f'target/{param}'] == expected, param
    of_param = [name for name in shapes if name.endswith(f'/{param}')]
    # The codebooks have no moments.
    assert len(of_param) == (1 if '/quantizer/' in param else 3), of_param
    assert {shapes[name] for name in of_param} == {expected}, param


@pytest.fixture(scope='module')
def abstract_state():
  model = make_model('adamw')
  initializer = utils.TrainStateInitializer(
    model.optimizer_def,
    model.get_initial_variables,
    {'decoder_input_tokens': (8, 8)},
    t5x_runs.partitioner((1, 1)),
  )
  return initializer.global_train_state_shape


@pytest.mark.parametrize('dims', DIMS)
@pytest.mark.parametrize('shape', MESHES)
def test_every_mesh_shards_parameters_moments_and_codebooks(abstract_state, shape, dims):
  partitioner = t5x_runs.partitioner(shape, dims)
  axes = by_name(partitioner.get_mesh_axes(abstract_state).state_dict())
  state = {
    name: jax.device_put(
      np.zeros(x.shape, x.dtype), NamedSharding(partitioner.mesh, axes.get(name, PartitionSpec()))
    )
    for name, x in by_name(abstract_state.state_dict()).items()
  }
  assert_sharded(shard_shapes(state), shape, dims)


@pytest.mark.parametrize(
  ('shape', 'dims', 'num_microbatches'),
  [((8, 1), (1, 1), 1), ((4, 2), (2, 2), 2), ((2, 4), (1, 2), 2), ((1, 8), (2, 1), 4)],
)
def test_no_mesh_changes_a_number(adamw_reference, tmp_path, shape, dims, num_microbatches):
  run = Run(make_model('adamw'), tmp_path, shape, dims, num_microbatches)
  assert_same(run, adamw_reference)
  # As they are after the last update, not as they were meant to be.
  assert_sharded(run.shapes, shape, dims)


@pytest.mark.parametrize(('shape', 'num_microbatches'), [((1, 2), 1), ((4, 2), 2)])
def test_devices_that_share_sequences_change_no_number(
  adamw_reference, tmp_path, shape, num_microbatches
):
  run = Run(make_model('adamw'), tmp_path, shape, (1, 2), num_microbatches, by_sequence=True)
  # AdamW magnifies what parts of a sum, rounded by themselves, differ in.
  assert_same(run, adamw_reference, 5 * TOLERANCE)
  # The model lies on the data axis only.
  assert run.shapes['target/layers_0/attention_0/gate/kernel'] == (32 // shape[0], 1, 64)


def test_the_runs_exercise_what_they_are_to_prove(adamw_reference):
  numbers, start = adamw_reference.numbers, adamw_reference.start
  assert numbers['gradient_norm'] > 0.1  # It is clipped.
  for name in ('quantizer/c_sum', 'quantizer/c_count', 'gate/kernel'):
    name = f'target/layers_0/attention_1/{name}'
    assert np.max(np.abs(numbers[name] - start[name])) > 100 * TOLERANCE, name
