"""Programs for one platform have the values and gradients of the plain ones, on every platform."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from util import LIGHT, assert_close, random_batch, random_params, small_model

from tvq_t5x.network import xla

GRADIENTS = {
  'on_cpu': xla._einsum_gradients_on_cpu,
  'elsewhere': xla._einsum_gradients,
}
EQUATIONS = {
  'BTD,DNK->BTNK': ((2, 3, 5), (5, 2, 4)),
  'BTHV,HVD->BTD': ((2, 7, 2, 3), (2, 3, 5)),
  'BTD,DF->BTF': ((1, 9, 2), (2, 3)),
  'BRNGLK,BRNJK->BRNGLJ': ((1, 2, 1, 3, 4, 5), (1, 2, 1, 6, 5)),
}


@pytest.mark.parametrize('gradients', GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize('equation', EQUATIONS)
def test_gradients_of_products(equation, gradients):
  keys = jax.random.split(jax.random.key(0), 3)
  x, y = (jax.random.normal(k, shape) for k, shape in zip(keys, EQUATIONS[equation], strict=False))
  out, pull_back = jax.vjp(lambda x, y: jnp.einsum(equation, x, y), x, y)
  g = jax.random.normal(keys[2], out.shape)
  assert_close(gradients(equation, x, y, g), pull_back(g))


@pytest.mark.parametrize('equation', [*EQUATIONS, 'BNGJ,BNJV->BNGV'])
def test_products_of_few_rows(equation):
  keys = jax.random.split(jax.random.key(0), 2)
  shapes = EQUATIONS.get(equation, ((2, 3, 1, 5), (2, 3, 5, 4)))
  x, y = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
  plain = functools.partial(jnp.einsum, equation)
  ours = functools.partial(xla._einsum_of_copies, equation, dtype=None)
  assert_close(jax.jvp(ours, (x, y), (x, y)), jax.jvp(plain, (x, y), (x, y)))


@pytest.mark.parametrize('shape', [(3,), (2, 3, 4), (1, 1)])
def test_sums_over_positions(shape):
  x = jax.random.normal(jax.random.key(0), shape)
  expected = [np.sum(np.asarray(x), axis=tuple(range(x.ndim - 1)))]
  assert_close(xla._sum_positions(x), expected)
  assert_close(xla._sum_positions_on_cpu(x), expected)


@pytest.mark.parametrize('number', [1, 4, 5])
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_arrays_are_stacked(monkeypatch, platform, number):
  monkeypatch.setattr(xla, 'platform', lambda: platform)
  arrays = [jax.random.normal(jax.random.key(i), (3, 2)) for i in range(number)]
  np.testing.assert_array_equal(jax.jit(xla.stack)(arrays), np.stack(arrays))


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_a_gradient_computed_once_is_rounded_as_products_round_it(monkeypatch, platform):
  monkeypatch.setattr(xla, 'platform', lambda: platform)
  x, weights = (jax.random.normal(jax.random.key(i), (3, 5)) for i in range(2))

  def loss(x, weights):
    return jnp.vdot(weights, xla.gradient_once(x))

  np.testing.assert_array_equal(jax.grad(loss)(x, weights), weights)  # Not in training.
  with xla.training_gradients():
    found = jax.grad(loss)(x, weights)
  if platform == 'tpu':
    weights = weights.astype(jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(found, weights)
  assert found.dtype == jnp.float32


@pytest.mark.slow  # Compiles for a TPU.
def test_gradients_of_logits_are_computed_once_on_tpu(tpus):
  mesh = Mesh(np.array(tpus('v5e:1x1')[:1]).reshape(1, 1), ('data', 'model'))
  sharding = NamedSharding(mesh, PartitionSpec())
  shapes = {'x': (1024, 256), 'table': (4096, 256), 'bias': (4096,)}
  params = {
    name: jax.ShapeDtypeStruct(x, 'float32', sharding=sharding) for name, x in shapes.items()
  }
  targets = jax.ShapeDtypeStruct((1024,), 'int32', sharding=sharding)

  def loss(params, targets):
    logits = xla.gradient_once(params['x'] @ params['table'].T) + params['bias']
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

  with jax.set_mesh(mesh), xla.training_gradients():
    traced = jax.jit(jax.grad(loss)).trace(params, targets)
    text = traced.lower(lowering_platforms=('tpu',)).compile().as_text()
  assert len(re.findall(r'\] exponential\(|\} exponential\(', text)) == 2  # Forward and backward.


@pytest.mark.parametrize('lengths', [(3, 3, 3), (3, 4)])
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_sums_of_einsums(monkeypatch, platform, lengths):
  monkeypatch.setattr(xla, 'platform', lambda: platform)
  rng = np.random.default_rng(0)
  xs = [jnp.asarray(rng.normal(size=(2, 5, n)), jnp.float32) for n in lengths]
  ys = [jnp.asarray(rng.normal(size=(2, n, 4)), jnp.float32) for n in lengths]
  expected = np.sum([x @ y for x, y in zip(xs, ys, strict=True)], axis=0)
  assert_close(xla.sum_of_einsums('BLJ,BJV->BLV', xs, ys), expected)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_totals_of_ones_are_exact(monkeypatch, platform):
  monkeypatch.setattr(xla, 'platform', lambda: platform)
  x = jax.random.bernoulli(jax.random.key(0), shape=(3, 400, 2, 5)).astype(jnp.bfloat16)
  for equation, axis in (('BTNS->NS', (0, 1)), ('BTNS->BNS', 1)):
    found = xla.total(equation, x)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.sum(np.asarray(x, np.float64), axis=axis))


@pytest.mark.parametrize('shift', [0, 2, -3, 7])
def test_arrays_are_rolled(shift):
  x = jnp.arange(24).reshape(2, 4, 3)
  for axis in (0, -2):
    rolled = jax.jit(lambda x, shift, axis=axis: xla.roll(x, shift, axis))(x, shift)
    np.testing.assert_array_equal(rolled, np.roll(x, shift, axis))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_sums_of_products(monkeypatch, platform, dtype):
  monkeypatch.setattr(xla, 'platform', lambda: platform)
  x, y = (jax.random.normal(jax.random.key(i), (2, 5, 300), dtype) for i in range(2))
  ours = xla.sum_of_products(x, y)
  assert ours.dtype == jnp.float32
  x, y = (np.asarray(z, np.float64) for z in (x, y))
  # Each product of 8 bits; 300 of them.
  rounding = 2.0**-8 if (platform, dtype) == ('tpu', 'bfloat16') else 1e-6
  error = np.abs(ours - np.sum(x * y, axis=-1, keepdims=True))
  assert np.all(error <= rounding * np.sum(np.abs(x * y), axis=-1, keepdims=True))


@pytest.mark.parametrize('num_devices', [1, 2])
def test_an_order_in_memory_is_asked_for_where_no_devices_share_the_array(monkeypatch, num_devices):
  monkeypatch.setattr(xla, 'platform', lambda: 'tpu')
  mesh, rows = Mesh(jax.devices()[:num_devices], 'data'), PartitionSpec('data')
  of_parts = jax.shard_map(xla.row_major, mesh=mesh, in_specs=rows, out_specs=rows)
  with jax.set_mesh(mesh):
    shared, parts = (str(jax.make_jaxpr(f)(np.zeros([2, 3]))) for f in (xla.row_major, of_parts))
  assert ('layout_constraint' in shared) == (num_devices == 1)
  assert 'layout_constraint' in parts


@pytest.mark.parametrize('rows', [1, 2, 5])
@pytest.mark.parametrize('columns', [1, 4, 7])
def test_platforms_shift_alike(rows, columns):
  """TPUs and GPUs take another way than CPUs."""
  for num_keys in (1, 3, 8):
    there = num_keys - columns
    for size, width, shift in ((columns, num_keys, there), (num_keys, columns, rows - 1 - there)):
      x = jax.random.normal(jax.random.key(0), [3, rows, size])
      np.testing.assert_array_equal(
        xla._shift_by_reshaping(x, width, shift), xla._shift_by_slices(x, width, shift)
      )


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_read_before_a_write_hides_no_bad_number(bad):
  row = jnp.arange(3.0)
  read = jnp.array([1.0, bad, -2.0])
  found = jax.jit(xla.depends_on)(read, row)
  np.testing.assert_array_equal(found, np.where(np.isnan(read), np.nan, row))
  ours = jax.jit(xla.read_rows)(row.astype(jnp.bfloat16), 2 * row)
  assert_close(ours, [row, 2 * row], rtol=0, atol=0)


def loss_of_model(**config):
  """The loss of a model by its parameters, and these."""
  model = small_model(**LIGHT, num_heads=2, **config)
  batch = random_batch(model.config, 2, 8)

  def loss(params):
    return model.segment_loss(params, batch, None, None, 16.0)[0]

  return loss, random_params(model.config)


@pytest.fixture(scope='module')
def loss():
  return loss_of_model()


@pytest.fixture(scope='module')
def direction(loss):
  params = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), loss[1])
  # By its codebooks a loss has no derivative but what brings their statistics.
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.zeros_like(x) if path[-1].key in ('c_sum', 'c_count') else x, params
  )


@pytest.mark.parametrize(
  'config', [{}, {'window_len': 4, 'reduction': 'unrolled'}], ids=['auto', 'unrolled']
)
def test_training_gradients_are_the_plain_ones(config):
  loss, params = loss_of_model(**config)
  plain = jax.jit(jax.grad(loss))(params)
  with xla.training_gradients():
    ours = jax.jit(jax.grad(loss))(params)
  assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def inner(a, b):
  return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_the_model_can_be_differentiated_forward(loss, direction):
  loss, params = loss
  _, slope = jax.jit(lambda p: jax.jvp(loss, (p,), (direction,)))(params)
  assert_close(slope, inner(jax.jit(jax.grad(loss))(params), direction), rtol=1e-4)


def test_products_with_the_hessian(loss, direction):
  loss, params = loss
  forward = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (direction,))[1])(params)
  backward = jax.jit(jax.grad(lambda p: inner(jax.grad(loss)(p), direction)))(params)
  assert_close(inner(forward, direction), inner(backward, direction), rtol=1e-3, atol=1e-4)
