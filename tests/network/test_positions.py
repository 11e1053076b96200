import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import assert_close

from tvq_t5x.network import xla
from tvq_t5x.network.positions import relative_shift, sinusoids, window_mask


@pytest.mark.quick
def test_sinusoids():
  places = np.array([[0, 1, 7], [100, 8191, 131071]])
  expected = np.zeros((2, 3, 6))
  for i, p in np.ndenumerate(places):
    for c in range(3):
      angle = p / 1e5 ** (2 * c / 6)
      expected[(*i, c)], expected[(*i, 3 + c)] = np.sin(angle), np.cos(angle)
  ours = sinusoids(jnp.asarray(places), 6, 1e5)
  assert ours.dtype == jnp.float32
  # float32 angles of 1e5 are known to 1e-2.
  assert_close(ours[0], expected[0].astype(np.float32))
  assert_close(ours[1], expected[1].astype(np.float32), atol=2e-2)


@pytest.mark.quick
@pytest.mark.parametrize(
  ('rows', 'columns', 'num_keys'),
  [(1, 1, 1), (1, 4, 4), (1, 4, 3), (3, 1, 3), (4, 3, 6), (4, 3, 4), (4, 3, 2), (2, 6, 7)],
)
def test_relative_shift(rows, columns, num_keys):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, rows, columns)).astype(np.float32)
  cotangent = rng.normal(size=(2, rows, num_keys)).astype(np.float32)
  expected, expected_gradient = np.zeros_like(cotangent), np.zeros_like(x)
  for i, e in np.ndindex(rows, columns):
    key = num_keys - rows + i - (columns - 1 - e)
    if key >= 0:
      expected[:, i, key] = x[:, i, e]
      expected_gradient[:, i, e] = cotangent[:, i, key]
  # The fast path and its oracle share this function: here its gradients are on their own.
  for context in (contextlib.nullcontext(), xla.training_gradients()):
    with context:
      out, pull_back = jax.vjp(lambda x: relative_shift(x, num_keys), jnp.asarray(x))
      np.testing.assert_array_equal(out, expected)
      np.testing.assert_array_equal(pull_back(jnp.asarray(cotangent))[0], expected_gradient)


@pytest.mark.quick
@pytest.mark.parametrize('within_window', [True, False])
@pytest.mark.parametrize(('block_len', 'window_len'), [(1, 1), (4, 2), (2, 5), (3, 3)])
def test_window_mask(block_len, window_len, within_window):
  num_empty = np.array([[0, 1], [window_len - 1, window_len]])
  ours = window_mask(block_len, window_len, jnp.asarray(num_empty), within_window)
  expected = np.zeros((2, 2, block_len, window_len + block_len), bool)
  for i in np.ndindex(2, 2):
    for query in range(block_len):
      for key in range(num_empty[i], window_len + block_len):
        distance = query - (key - window_len)
        expected[(*i, query, key)] = 0 <= distance and (distance <= window_len or not within_window)
  in_window, in_present = (np.broadcast_to(x, (2, 2, block_len, x.shape[-1])) for x in ours)
  np.testing.assert_array_equal(in_window, expected[..., :window_len])
  np.testing.assert_array_equal(in_present, expected[..., window_len:])
