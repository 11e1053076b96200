"""The state-space layer beside its recurrence, written out in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_t5x.network.longvq import ssm
from tvq_t5x.network.longvq.ssm import SSM, Initialization

D = 5


def setup_of(length, batch_size=2, **fields):
  layer = SSM(**{'state_size': 6, 'chunk_len': 4, **fields})
  u = jax.random.normal(jax.random.key(0), [batch_size, length, D])
  params = layer.init(jax.random.key(1), u)['params']
  return layer, params, u


def discretized(layer, params):
  """`Ab`, `Bb`, C (and C of what comes after) and d, in double precision."""
  p = {name: np.asarray(x, np.float64) for name, x in params.items()}
  a = -np.exp(p['log_decay']) + 1j * p.get('frequency', 0)
  b = p['b_re'] + 1j * p.get('b_im', 0)
  step = np.exp(np.exp(p['log_dt'])[:, None] * a)
  twice = 2 if layer.complex_modes else 1
  c = [twice * (p[f'{n}_re'] + 1j * p.get(f'{n}_im', 0)) for n in ('c', 'c2') if f'{n}_re' in p]
  return step, (step - 1) / a * b, c, p['d']


def recurrence(layer, params, u, x=None):
  """Position by position."""
  step, b, (c, *_), d = discretized(layer, params)
  u = np.asarray(u, np.float64)
  x = np.zeros((len(u), *step.shape), complex) if x is None else x
  y = np.zeros_like(u)
  for t in range(u.shape[1]):
    x = step * x + b * u[:, t, :, None]
    y[:, t] = np.sum(c * x, axis=-1).real + d * u[:, t]
  return y, x


@pytest.mark.parametrize('complex_modes', [True, False])
@pytest.mark.parametrize(
  ('length', 'chunk_len'), [(1, 4), (3, 4), (4, 4), (13, 4), (13, 1), (7, 99)]
)
def test_convolved_chunks_are_the_recurrence(length, chunk_len, complex_modes):
  layer, params, u = setup_of(length, chunk_len=chunk_len, complex_modes=complex_modes)
  y, state = jax.jit(layer.apply)({'params': params}, u)
  expected, x = recurrence(layer, params, u)
  np.testing.assert_allclose(y, expected, atol=2e-5)
  np.testing.assert_allclose(state[..., 0] + 1j * state[..., 1], x, atol=2e-5)


def test_a_segment_goes_on_where_another_ended():
  layer, params, u = setup_of(13)
  whole, end = layer.apply({'params': params}, u)
  state, parts = None, []
  for start, stop in ((0, 5), (5, 6), (6, 13)):
    y, state = layer.apply({'params': params}, u[:, start:stop], state)
    parts.append(y)
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)
  np.testing.assert_allclose(state, end, atol=2e-5)


def test_the_state_is_of_as_many_positions_as_each_row_has():
  layer, params, u = setup_of(9, batch_size=4)
  _, before = layer.apply({'params': params}, u[:, ::-1])
  lengths = jnp.array([0, 1, 5, 9])
  _, after = jax.jit(layer.apply)({'params': params}, u, before, lengths)
  for row, length in enumerate(lengths):
    expected = before[row : row + 1]
    if length:
      expected = layer.apply({'params': params}, u[row : row + 1, :length], expected)[1]
    np.testing.assert_allclose(after[row], expected[0], atol=2e-5)


@pytest.mark.parametrize('length', [1, 2, 11])
def test_both_ways(length):
  layer, params, u = setup_of(length, bidirectional=True)
  step, b, (c, ahead), d = discretized(layer, params)
  n = np.arange(length)
  powers = step[..., None] ** n
  past, future = (np.sum((w * b)[..., None] * powers, axis=1).real for w in (c, ahead))
  distance = n[:, None] - n[None]
  kernel = np.where(distance >= 0, past[:, np.maximum(distance, 0)], 0)
  kernel += np.where(distance < 0, future[:, np.maximum(-distance - 1, 0)], 0)
  u64 = np.asarray(u, np.float64)
  expected = np.einsum('Dts,BsD->BtD', kernel, u64) + d * u64
  np.testing.assert_allclose(layer.apply({'params': params}, u)[0], expected, atol=2e-5)


def test_gradients_do_not_depend_on_the_chunks():
  layer, params, u = setup_of(11)
  weights = jax.random.normal(jax.random.key(2), u.shape)

  def gradients(chunk_len):
    def loss(params, u, state):
      y, after = layer.clone(chunk_len=chunk_len).apply({'params': params}, u, state)
      return jnp.sum(weights * y) + jnp.sum(after**2)

    state = 0.1 * jnp.ones([2, D, 3, 2])
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, u, state)

  whole = jax.tree.leaves(gradients(99))
  for found, expected in zip(jax.tree.leaves(gradients(3)), whole, strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_the_modes_of_legs_are_the_published_ones():
  """Imaginary parts of the eigenvalues of the normal part of HiPPO-LegS, N = 16 (S4D)."""
  modes = ssm._initial_modes(Initialization.LEGS, 16, True)
  published = [0.352, 1.372, 2.900, 5.090, 8.362, 13.834, 25.629, 80.966]
  np.testing.assert_allclose(np.sort(modes.w), published, atol=5e-4)
  np.testing.assert_allclose(np.exp(modes.a), 0.5)


@pytest.mark.parametrize('initialization', list(Initialization))
def test_every_initialization_is_stable(initialization):
  layer, params, _ = setup_of(1, initialization=initialization, state_size=16)
  step, *_ = discretized(layer, params)
  assert step.shape == (D, 8)
  assert np.all(np.abs(step) < 1)
