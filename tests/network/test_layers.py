import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_t5x.network.layers import silu

pytestmark = pytest.mark.quick


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


def test_silu_of_float32_is_that_of_jax():
  x = jnp.linspace(-30, 30, 1001)
  np.testing.assert_array_equal(silu(x), jax.nn.silu(x))
