"""Meshes and microbatches change no number: loss, gradients, codebooks, parameters, moments."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio
from classifier_util import NUM_CLASSES, random_examples
from mesh_util import (
  OPTIMIZERS,
  SIZES,
  TOLERANCE,
  assert_same_numbers,
  by_name,
  on_host,
  shard_shapes,
)
from util import random_batch

from tvq_t5x.data.classification import Format
from tvq_t5x.network import gathering
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.training import placement
from tvq_t5x.training.base_model import Batch, Model
from tvq_t5x.training.classifier import ClassifierModel
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.partitioning import Partitioner, standard_logical_axis_rules
from tvq_t5x.training.train_step import train_on_sequences

BATCH_SIZE, LENGTH, UPDATE_LEN, STEPS = 8, 32, 16, 3

pytestmark = pytest.mark.skipif(
  len(jax.devices('cpu')) < 8, reason='XLA_FLAGS is set in the environment, without 8 CPU devices'
)

# Codes start from keys and are replaced by keys: those of the same places in the global batch.
_LIVING = {'codes_from_keys': True, 'replace_below': 0.5}
_CASES = {
  'shga': ({'num_layers': 1, 'scan_layers': False}, 'adamw'),
  # Short enough for eight parts.
  'short_blocks': (
    {'num_layers': 1, 'scan_layers': False, 'block_len': 2, 'window_len': 2},
    'sgd',
  ),
  # Wide enough for factored moments.
  'mha': (
    {'num_layers': 2, 'head_type': 'mha', 'num_heads': 2, 'emb_dim': 128, **_LIVING},
    'adafactor',
  ),
  'carried': ({'num_layers': 2, 'key_dim': 8}, 'adamw'),
  'longvq': ({'num_layers': 2, 'sublayers': ('longvq', 'mlp'), **_LIVING}, 'sgd'),
  'encoder': (
    {'num_layers': 2, 'sublayers': ('vq', 'longvq'), 'bidirectional': True, **_LIVING},
    'sgd',
  ),
}


class Run(NamedTuple):
  """Result of a few updates, on the host, and shapes of the parts of the state on one device."""

  numbers: dict[str, np.ndarray]
  shard_shapes: dict[str, tuple[int, ...]]


def keep_gradients(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """`optimizer` whose state also has the last gradients, codebook statistics included."""

  def init(params):
    return {'gradients': jax.tree.map(jnp.zeros_like, params), 'inner': optimizer.init(params)}

  def update(gradients, state, params=None):
    updates, inner = optimizer.update(gradients, state['inner'], params)
    return updates, {'gradients': gradients, 'inner': inner}

  return optax.GradientTransformation(init, update)


@functools.cache
def make_model(case: str) -> Model:
  fields, optimizer = _CASES[case]
  config = TransformerConfig(**{**SIZES, **fields})
  vocabulary, of = seqio.PassThroughVocabulary(32), OPTIMIZERS[optimizer]()
  if config.bidirectional:
    model = ClassifierModel(config, Format(vocabulary, NUM_CLASSES, pair=True), of)
  else:
    carry_state = case == 'carried'
    model = TransformerVQModel(Transformer(config), vocabulary, of, carry_state=carry_state)
  model.optimizer = keep_gradients(model.optimizer)
  return model


@functools.cache
def initial_state(case: str) -> Any:
  partitioner = Partitioner(devices=jax.devices('cpu')[:1])
  return jax.device_get(
    placement.init_state(partitioner, make_model(case), jax.random.key(1), BATCH_SIZE)
  )


def make_batch(model: Model, seed: int) -> Batch:
  if isinstance(model, ClassifierModel):
    return random_examples(model, BATCH_SIZE, LENGTH, seed=seed)
  batch = random_batch(model.config, BATCH_SIZE, LENGTH, seed=seed)
  # An example that is padding from its first update on, in an interior microbatch and shard.
  batch['decoder_loss_weights'] = batch['decoder_loss_weights'].at[2, 9:].set(0.0)
  # Where the state is carried on from one batch to the next, some rows begin anew.
  batch['decoder_input_tokens'] = batch['decoder_input_tokens'].at[seed::2, 0].set(5)
  return batch


@functools.cache
def train(
  case: str,
  data: int,
  model_axis: int,
  num_microbatches: int,
  dims: int = 1,
  by_sequence: bool = False,
  segment_len: int | None = None,
) -> Run:
  model = make_model(case)
  update_len = LENGTH if model.config.bidirectional else UPDATE_LEN
  rules = standard_logical_axis_rules(1 if by_sequence else dims, dims)
  partitions = (1, model_axis) if by_sequence else (model_axis, 1)
  devices = jax.devices('cpu')[: data * model_axis]
  partitioner = Partitioner(partitions[0], rules, devices, partitions[1])
  placement.validate(partitioner, model.config, BATCH_SIZE, num_microbatches)
  placement.validate_length(partitioner, model.config, segment_len or update_len)
  shardings = placement.train_state_shardings(partitioner, model)
  step = partitioner.jit(
    lambda state, batch: train_on_sequences(
      model, state, batch, jax.random.key(2), update_len, num_microbatches, segment_len=segment_len
    ),
    (shardings, partitioner.batch_sharding()),
    (shardings, None),
    donate_argnums=0,
  )
  state, losses = jax.device_put(initial_state(case), shardings), []
  for i in range(STEPS):
    batch = jax.device_put(make_batch(model, i), partitioner.batch_sharding())
    state, step_metrics = step(state, batch)
    losses.append({name: x.total / x.count for name, x in step_metrics.items()})
  assert int(state.step) == STEPS * LENGTH // update_len
  numbers = by_name({'state': state._asdict(), 'metrics': losses})
  return Run(on_host(numbers), shard_shapes(by_name(state._asdict())))


def assert_same(run: Run, expected: Run, tolerance: float = TOLERANCE) -> None:
  assert_same_numbers(run.numbers, expected.numbers, tolerance)


def assert_codes_are_replaced(run: Run, name: str) -> None:
  counts = run.numbers[f'state/opt_state/gradients/layers/{name}/quantizer/c_count']
  assert np.any(counts % 1)  # Not as many as keys.


@pytest.mark.parametrize(
  ('data', 'model_axis', 'num_microbatches'),
  [(1, 1, 2), (2, 1, 4), (1, 2, 1), (2, 2, 2), (4, 2, 2)],
)
@pytest.mark.slow
def test_shga_is_the_same_on_every_mesh(data, model_axis, num_microbatches):
  assert_same(train('shga', data, model_axis, num_microbatches), train('shga', 1, 1, 1))


def test_shga_is_the_same_with_activations_and_parameters_sharded_in_two_dimensions():
  run = train('shga', 4, 2, 2, dims=2)
  assert_same(run, train('shga', 1, 1, 1))
  shapes = run.shard_shapes
  assert shapes['params/token_embedder/embedding'] == (32 // 2, 32 // 4)
  assert shapes['params/layers_0/attention_0/gate/kernel'] == (32 // 4, 1, 64 // 2)
  assert shapes['params/layers_0/attention_0/quantizer/c_sum'] == (1, 16 // 2, 16)


@pytest.mark.slow
def test_kernels_gathered_in_steps_change_no_number(monkeypatch):
  sizes = {2: (2,), 4: (2, 2)}
  monkeypatch.setattr(gathering, 'steps_of', lambda mesh, name: sizes[mesh.shape[name]])
  run = train.__wrapped__('mha', 4, 2, 1, dims=2)  # None that is kept from without steps.
  assert_same(run, train('mha', 1, 1, 1))
  assert run.shard_shapes['params/layers/mlp/wi/kernel'] == (2, 128 // 4, 512 // 2)


@pytest.mark.slow
def test_mha_with_scanned_layers_and_adafactor_is_the_same_on_a_mesh():
  run = train('mha', 2, 2, 2)
  assert_same(run, train('mha', 1, 1, 1))
  shapes = run.shard_shapes
  layer = 'layers/attention_0'
  assert shapes[f'params/{layer}/query/kernel'] == (2, 128, 2 // 2, 16)
  assert shapes[f'params/{layer}/quantizer/c_sum'] == (2, 2 // 2, 16, 16)
  factors = {
    name.rsplit('/', 5)[1]: shape
    for name, shape in shapes.items()
    if name.endswith('layers/mlp/wi/kernel') and '/v_' in name
  }
  assert factors == {'v_row': (2, 128), 'v_col': (2, 512 // 2)}
  assert_codes_are_replaced(run, 'attention_0')


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'num_microbatches'), [(1, 2), (4, 2)])
def test_state_carried_from_batch_to_batch_is_the_same_on_every_mesh(data, num_microbatches):
  run = train('carried', data, 2, num_microbatches)
  # AdamW magnifies rounding where gradients cancel.
  assert_same(run, train('carried', 1, 1, 1), 5 * TOLERANCE)
  shape = run.shard_shapes['carried/layers/0/values']
  assert shape == (2, BATCH_SIZE // data, 8, 1, 64 // 2)


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'model_axis', 'num_microbatches'), [(2, 2, 2)])
def test_longvq_is_the_same_on_every_mesh(data, model_axis, num_microbatches):
  run = train('longvq', data, model_axis, num_microbatches)
  # Normalized keys leave little of the gradients of what scales them.
  assert_same(run, train('longvq', 1, 1, 1), 20 * TOLERANCE)
  # [layers, D, n]: the channels of the state-space layer are shared out.
  shape = run.shard_shapes['params/layers/longvq_0/ssm/frequency']
  assert shape == (2, 32 // model_axis, 32)


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'model_axis', 'num_microbatches'), [(2, 2, 2)])
def test_an_encoder_is_the_same_on_every_mesh(data, model_axis, num_microbatches):
  run = train('encoder', data, model_axis, num_microbatches)
  assert_same(run, train('encoder', 1, 1, 1), 20 * TOLERANCE)
  shape = run.shard_shapes['params/layers/attention_0/quantizer/c_sum']
  assert shape == (2, 1, 16 // model_axis, 16)
  before = by_name({'params': initial_state('encoder').params})
  for name in ('head/kernel', 'layers/attention_0/quantizer/c_sum'):
    change = run.numbers[f'state/params/{name}'] - before[f'params/{name}']
    assert np.max(np.abs(change)) > 100 * TOLERANCE


@pytest.mark.parametrize(
  ('data', 'parts', 'num_microbatches', 'dims', 'segment_len'),
  [(2, 4, 2, 2, 8), *((*x, 1, 1, None) for x in ((1, 2), (1, 4), (1, 8), (2, 2)))],
)
@pytest.mark.slow
def test_numbers_are_the_same_on_devices_that_share_sequences(
  data, parts, num_microbatches, dims, segment_len
):
  run = train('short_blocks', data, parts, num_microbatches, dims, True, segment_len)
  assert_same(run, train('short_blocks', 1, 1, 1))
  shapes, other = run.shard_shapes, data if dims == 2 else 1
  assert shapes['params/layers_0/attention_0/gate/kernel'] == (32 // other, 1, 64)
  assert shapes['params/layers_0/attention_0/quantizer/c_sum'] == (1, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize('case', ['mha', 'longvq', 'encoder'])
def test_living_codes_are_the_same_on_devices_that_share_sequences(case):
  run = train(case, 2, 2, 2, by_sequence=True)
  assert_same(run, train(case, 1, 1, 1), 20 * TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize('data', [1, 4])
def test_carried_state_is_the_same_on_devices_that_share_sequences(data):
  run = train('carried', data, 2, 2, by_sequence=True)
  assert_same(run, train('carried', 1, 1, 1), 20 * TOLERANCE)
  # The state leaves at the last part, and all devices have it.
  assert run.shard_shapes['carried/layers/0/values'] == (2, BATCH_SIZE // data, 8, 1, 64)


def test_every_device_has_its_part_only():
  shapes = train('shga', 4, 2, 2).shard_shapes
  layer = 'layers_0/attention_0'
  assert shapes[f'params/{layer}/quantizer/c_sum'] == (1, 16 // 2, 16)
  assert shapes[f'params/{layer}/quantizer/c_count'] == (1, 16 // 2)
  assert shapes['params/token_embedder/embedding'] == (32 // 2, 32)
  of_gate = [shape for name, shape in shapes.items() if name.endswith(f'{layer}/gate/kernel')]
  # The parameter, its gradient and its two moments.
  assert of_gate == [(32, 1, 64 // 2)] * 4


def test_the_runs_exercise_what_they_are_to_prove():
  reference = train('shga', 1, 1, 1)
  numbers = reference.numbers
  layer = 'layers_0/attention_0'
  start = by_name({'params': initial_state('shga').params})
  for name in ('quantizer/c_sum', 'quantizer/c_count', 'gate/kernel'):
    before, after = start[f'params/{layer}/{name}'], numbers[f'state/params/{layer}/{name}']
    assert np.max(np.abs(after - before)) > 100 * TOLERANCE
    assert np.any(numbers[f'state/opt_state/gradients/{layer}/{name}'])
  assert_codes_are_replaced(train('longvq', 1, 1, 1), 'longvq_0')
  clipped = [x for name, x in numbers.items() if name.endswith('gradient_norm')]
  assert np.min(clipped) > 0.1
