"""Building blocks: activations, projections and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import assert_close

from tvq_t5x.network import xla
from tvq_t5x.network.layers import Einsum, dropout, silu


@pytest.mark.quick
def test_silu_is_rounded_once():
  x = jnp.linspace(-30, 30, 4001).astype(jnp.bfloat16)
  exact = np.asarray(x, np.float64)
  sigmoid = 1 / (1 + np.exp(-exact))
  found, slope = jax.jvp(silu, (x,), (jnp.ones_like(x),))
  assert found.dtype == slope.dtype == jnp.bfloat16
  # Half a unit in the last place, and what float32 leaves of small differences.
  np.testing.assert_allclose(np.asarray(found, np.float64), exact * sigmoid, rtol=2**-8, atol=1e-5)
  expected = sigmoid * (1 + exact * (1 - sigmoid))
  np.testing.assert_allclose(np.asarray(slope, np.float64), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.quick
def test_silu_of_float32_is_that_of_jax():
  x = jnp.linspace(-30, 30, 1001)
  np.testing.assert_array_equal(silu(x), jax.nn.silu(x))


@pytest.mark.parametrize(
  ('equation', 'x_shape', 'kernel_shape', 'num_in_axes'),
  [
    ('BTD,DNK->BTNK', (2, 3, 4), (4, 2, 5), 1),
    ('BTHV,HVD->BTD', (2, 3, 4, 5), (4, 5, 6), 2),
    ('CD,DNK->CNK', (7, 4), (4, 1, 2), 1),
  ],
)
def test_projection_and_its_gradients(equation, x_shape, kernel_shape, num_in_axes):
  rng = np.random.default_rng(0)
  x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (x_shape, kernel_shape))
  module = Einsum(equation, kernel_shape, ('embed',) * len(kernel_shape), num_in_axes)
  variables = module.init(jax.random.key(0), x)
  assert variables['params']['kernel'].shape == kernel_shape

  def ours(x, kernel):
    return module.apply({'params': {'kernel': kernel}}, x)

  def expected(x, kernel):
    return jnp.einsum(equation, x, kernel)

  assert_close(ours(x, kernel), expected(x, kernel))
  # Not linear, so that the gradients are of random cotangents.
  for argument in (0, 1):
    gradients = [
      jax.grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), argument)(x, kernel)
      for f in (ours, expected)
    ]
    assert_close(*gradients)


def test_initial_kernels_keep_the_variance():
  module = Einsum('BTHV,HVD->BTD', (20, 30, 40), ('heads', 'kv', 'embed'), 2)
  kernel = module.init(jax.random.key(0), jnp.zeros([1, 1, 20, 30]))['params']['kernel']
  # Fan-in is heads times width, and the entries are 24,000: 3 % is seven standard deviations.
  assert abs(kernel.std() * 600**0.5 - 1) < 0.03


@pytest.mark.parametrize(
  ('equation', 'shape', 'input_shape'),
  [
    ('BTD,DHK->BTHK', (5, 1, 4), (2, 3, 5)),
    ('BTHV,HVD->BTD', (1, 4, 5), (2, 3, 1, 4)),
    ('BTHV,HVD->BTD', (2, 1, 5), (2, 3, 2, 1)),
    ('BTD,DHK->BTHK', (5, 2, 4), (2, 3, 5)),
  ],
)
def test_a_projection_of_a_single_head_is_that_of_any(monkeypatch, equation, shape, input_shape):
  x = jax.random.normal(jax.random.key(1), input_shape)
  module = Einsum(equation, shape, ('embed', 'heads', 'kv'))
  params = module.init(jax.random.key(0), x)

  def squares(params, x):
    with xla.training_gradients():
      y = module.apply(params, x)
    return jnp.sum(y**2), y

  run = jax.value_and_grad(squares, argnums=(0, 1), has_aux=True)
  expected = run(params, x)
  assert_close(expected[0][1], jnp.einsum(equation, x, params['params']['kernel']), atol=1e-5)
  monkeypatch.setattr(xla, 'platform', lambda: 'tpu')
  assert_close(run(params, x), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('per_example', [False, True])
def test_dropout_rate(per_example):
  x = 2 + jnp.zeros([400, 5, 6])
  position = None if per_example else jnp.zeros([400], jnp.int32)
  out = np.asarray(dropout(jax.random.key(0), x, 0.3, jnp.arange(400), position))
  dropped = out == 0
  np.testing.assert_allclose(out[~dropped], 2 / 0.7, rtol=1e-6)
  # Four standard deviations of a mean of independent drops.
  independent = 400 if per_example else out.size
  assert abs(dropped.mean() - 0.3) < 4 * (0.3 * 0.7 / independent) ** 0.5
  of_example = dropped.reshape(400, -1).mean(axis=1)
  assert np.all(np.isin(of_example, [0, 1])) == per_example


@pytest.mark.parametrize('width', [6, 7, 256, 384, 512])
def test_dropout_drops_the_entries_of_a_position_independently(width):
  x = jnp.ones([4000, 1, width])
  dropped = dropout(jax.random.key(0), x, 0.3, jnp.arange(4000), jnp.zeros([4000], jnp.int32)) == 0
  assert dropped.shape == x.shape
  correlation = np.corrcoef(np.asarray(dropped)[:, 0].T) - np.eye(width)
  # Four standard deviations; six, where there are many pairs.
  assert np.abs(correlation).max() < (4 if width < 10 else 6) / 4000**0.5


def test_dropout_of_a_part_is_that_of_the_whole():
  x, ids = jnp.ones([3, 7, 6]), jnp.array([4, 0, 9])
  position = jnp.array([2, 0, 5])
  whole = dropout(jax.random.key(0), x, 0.5, ids, position)
  part = dropout(jax.random.key(0), x[1:, 3:], 0.5, ids[1:], position[1:] + 3)
  np.testing.assert_array_equal(part, whole[1:, 3:])
  masks = np.asarray(whole).reshape(21, 6) > 0
  assert len(np.unique(masks, axis=0)) > 10  # Positions do not share their masks.


@pytest.mark.parametrize('position', [None, jnp.zeros([2], jnp.int32)], ids=['rows', 'tokens'])
def test_dropout_knows_keys_of_both_kinds(position):
  x, ids = jnp.ones([2, 5, 3]), jnp.arange(2)
  new, old = (
    dropout(key(3), x, 0.5, ids, position) for key in (jax.random.key, jax.random.PRNGKey)
  )
  np.testing.assert_array_equal(new, old)
