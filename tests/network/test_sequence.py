"""A sequence on many devices has the values, the state and the gradients of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from test_attention import make_config, quantize, queries_of, random_inputs
from test_bidirectional import draw
from util import assert_close

from tvq_t5x.network import sequence, xla
from tvq_t5x.network.longvq.ssm import SSM
from tvq_t5x.network.vq.attention import Keys, vq_attention
from tvq_t5x.network.vq.bidirectional import bidirectional_attention
from tvq_t5x.network.vq.cache import init_attention_state
from tvq_t5x.network.vq.parts import shared_attention

pytestmark = pytest.mark.skipif(
  len(jax.devices('cpu')) < 8, reason='XLA_FLAGS is set in the environment, without 8 CPU devices'
)
RULES = (('batch', 'data'), ('length', 'model'))


def mesh_of(data, parts):
  devices = np.array(jax.devices('cpu')[: data * parts]).reshape(data, parts)
  return Mesh(devices, ('data', 'model'))


def shared_by(data, parts, function):
  """A function on the devices of a mesh, of arrays that are anywhere."""

  def traced(*args):
    with sequence.shared_by(mesh_of(data, parts), RULES):
      return function(*args)

  return jax.jit(traced)


def with_gradients(function, cotangents):
  """Values of a function, and of their weighted sum all gradients, as in training."""

  def run(args):
    def total(args):
      values = function(*args)
      floats = [x for x in jax.tree.leaves(values) if jnp.issubdtype(x.dtype, jnp.floating)]
      return sum(jnp.vdot(x, y) for x, y in zip(floats, cotangents(floats), strict=True)), values

    with xla.training_gradients():
      (_, values), gradients = jax.value_and_grad(total, has_aux=True)(args)
    return values, gradients

  return run


def random_like(arrays):
  rng = np.random.default_rng(7)
  return [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in arrays]


def attention_case(config, batch_size, length, before):
  """A function of what attention can be differentiated by, and its arguments.

  The state is of the `before` positions before the sequence, different in each row.
  """
  x, codebook = random_inputs(config, batch_size, before + length)
  quantized, codes = quantize(x['keys'], codebook)
  arrays = queries_of(x), Keys(quantized, codes, x['values'])
  state = init_attention_state(config, batch_size)
  attend = jax.jit(functools.partial(vq_attention, config=config))
  for i in range(before):
    one = jax.tree.map(lambda a, i=i: a[:, i : i + 1], arrays)
    position = jnp.full([batch_size], i, jnp.int32)
    _, state = attend(*one, x['distances'], codebook, state, position)
  (queries, keys) = jax.tree.map(lambda a: a[:, before:], arrays)
  floats = queries, keys.quantized, keys.values, x['distances'], state.keys, state.values
  position = jnp.full([batch_size], before, jnp.int32)

  def run_with(attend, lengths=None):
    def run(queries, quantized, values, distances, state_keys, state_values, means):
      all_keys = Keys(quantized, keys.codes, values)
      cache = state.cache._replace(means=means)
      old = state._replace(keys=state_keys, values=state_values, cache=cache)
      return attend(queries, all_keys, distances, codebook, old, position, config, lengths)

    return with_gradients(run, random_like)

  return run_with, (*floats, state.cache.means)


def assert_same_attention(config, data, parts, length, before=0, lengths=None):
  run_with, args = attention_case(config, 2 * data, length, before)
  expected = jax.jit(run_with(vq_attention, lengths))(args)
  found = shared_by(data, parts, run_with(shared_attention, lengths))(args)
  assert_close(found, expected, atol=3e-5)


@pytest.mark.parametrize(
  ('data', 'parts', 'window_len'),
  [
    (4, 1, 4),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in ((2, 2, 4), (1, 2, 8), (8, 1, 3))),
  ],
)
def test_unrolled_blocks_on_devices_are_those_of_one(data, parts, window_len):
  config = make_config(window_len=window_len, head_type='mqa', num_heads=2, reduction='unrolled')
  assert_same_attention(config, data, parts, 8 * parts, before=3)


def test_each_device_computes_with_its_rows():
  seen = []

  def total(rows, shared):
    seen.append(rows.shape)
    return jnp.sum(rows * shared, axis=1)

  def run(data, parts, batch_size):
    rows = jnp.arange(3.0 * batch_size).reshape(batch_size, 3)
    shared = jnp.array([1.0, -2.0, 5.0])
    ours = shared_by(data, parts, lambda *args: sequence.on_rows(total, *args))(rows, shared)
    np.testing.assert_array_equal(ours, rows @ shared)
    return seen.pop()

  assert run(4, 1, 8) == (2, 3)
  # All rows at once, where some device would have none of them, or other devices share them.
  assert run(4, 1, 6) == (6, 3)
  assert run(2, 2, 8) == (8, 3)
  assert sequence.on_rows(total, jnp.ones([2, 3]), jnp.ones(3)).shape == (2,)


@st.composite
def cases(draw):
  block_len = draw(st.sampled_from([1, 2, 3, 5]))
  part = block_len * draw(st.integers(1, 3))
  config = make_config(
    block_len=block_len,
    window_len=draw(st.integers(1, part)),
    num_codes=draw(st.integers(1, 4)),
    head_type=draw(st.sampled_from(['gated', 'mha', 'mqa'])),
    num_heads=draw(st.integers(1, 2)),
    compressed_cache=draw(st.booleans()),
    grad_through_cache=draw(st.booleans()),
    reduction=draw(st.sampled_from(['serial', 'unrolled', 'matmul', 'associative'])),
  )
  data, parts = draw(st.sampled_from([(1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (1, 3), (1, 5)]))
  return config, data, parts, parts * part, draw(st.integers(0, 4))


def ssm_case(batch_size, length, **fields):
  layer = SSM(**{'state_size': 6, 'chunk_len': 4, **fields})
  u = jax.random.normal(jax.random.key(0), [batch_size, length, 5])
  params = layer.init(jax.random.key(1), u)['params']
  state = jax.random.normal(jax.random.key(2), [batch_size, 5, layer.state_size // 2, 2])
  return layer, (params, u, state)


@pytest.mark.parametrize(('data', 'parts', 'length'), [(2, 2, 14), (1, 8, 40)])
def test_the_state_space_layer_of_parts_is_that_of_one_device(data, parts, length):
  layer, args = ssm_case(2, length)
  run = with_gradients(
    lambda params, u, state: layer.apply({'params': params}, u, state), random_like
  )
  assert_close(shared_by(data, parts, run)(args), jax.jit(run)(args), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('parts', [2, 8])
def test_a_state_space_layer_that_looks_both_ways_is_that_of_one_device(parts):
  layer, (params, u, _) = ssm_case(2, 5 * parts, bidirectional=True)
  run = with_gradients(lambda params, u: layer.apply({'params': params}, u)[0], random_like)
  found = shared_by(1, parts, run)((params, u))
  assert_close(found, jax.jit(run)((params, u)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(('data', 'parts', 'projected'), [(2, 2, True), (1, 8, False)])
def test_attention_to_all_positions_is_that_of_one_device(data, parts, projected):
  queries, keys, distances, codebook, mask = draw(6 * parts, 2, projected)

  def attend(queries, values, distances):
    all_keys = keys._replace(values=values)
    out = bidirectional_attention(queries, all_keys, distances, codebook, mask, 3)
    return jnp.where(mask[..., None, None, None] > 0, out, 0)

  run, args = with_gradients(attend, random_like), (queries, keys.values, distances)
  assert_close(shared_by(data, parts, run)(args), jax.jit(run)(args), atol=3e-5)


def test_the_state_space_layers_state_of_rows_that_end_in_any_part():
  layer, (params, u, state) = ssm_case(5, 12)
  lengths = jnp.array([0, 1, 6, 7, 12], jnp.int32)

  def run(params, u, state):
    return layer.apply({'params': params}, u, state, lengths)

  assert_close(shared_by(1, 4, run)(params, u, state), jax.jit(run)(params, u, state))


def test_exchanges_grow_with_the_logarithm_of_the_devices():
  config = make_config(block_len=2, window_len=3)
  run_with, args = attention_case(config, 2, 32, 0)
  found = {}
  for parts in (2, 4, 8):
    with sequence.shared_by(mesh_of(1, parts), RULES):
      found[parts] = str(jax.make_jaxpr(run_with(shared_attention))(args)).count(' ppermute[')
  assert 0 < found[4] - found[2] == found[8] - found[4]


# Every example compiles anew: few of them, and no search for a smaller one when one fails.
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])
@given(cases())
def test_attention_of_parts_is_that_of_one_device(case):
  assert_same_attention(*case)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(cases())
def test_attention_of_parts_is_that_of_one_device_at_many_sizes(case):
  assert_same_attention(*case)


@pytest.mark.slow
@pytest.mark.parametrize('grad_through_cache', [True, False])
def test_attention_of_parts_at_eight_devices(grad_through_cache):
  config = make_config(
    num_heads=2, block_len=2, window_len=5, grad_through_cache=grad_through_cache
  )
  assert_same_attention(config, 1, 8, 8 * 6, before=7)


@pytest.mark.slow
def test_the_state_of_rows_that_end_in_any_part():
  config = make_config(block_len=2, window_len=3)
  for lengths in ([0, 1], [4, 5], [9, 16]):
    assert_same_attention(config, 1, 4, 16, 4, jnp.array(lengths, jnp.int32))
