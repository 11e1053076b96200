"""The baseline a block of queries at a time, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import assert_close

from tvq_t5x.network import quadratic
from tvq_t5x.network.attention import Queries
from tvq_t5x.network.vq.oracle import dense_attention

pytestmark = pytest.mark.quick


@pytest.mark.parametrize('num_earlier', [0, 3])
def test_blocks_equal_the_definition(num_earlier, monkeypatch):
  length, most = 13, 4
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  num_keys = num_earlier + length
  inputs = {
    'content': normal(2, length, 2, 3, 4),
    'position': normal(2, length, 2, 3, 4),
    'keys': normal(2, num_keys, 2, 4),
    'values': normal(2, num_keys, 2, 5),
    'distances': normal(7, 2, 4),
  }

  def arguments(x):
    return Queries(x['content'], x['position']), x['keys'], x['values'], x['distances']

  @jax.jit
  def run(x, cotangent):
    out, pull_back = jax.vjp(lambda x: quadratic.quadratic_attention(*arguments(x)), x)
    return out, pull_back(cotangent)[0]

  @jax.jit
  def expect(x, cotangent):
    out, pull_back = jax.vjp(lambda x: dense_attention(*arguments(x)), x)
    return out, pull_back(cotangent)[0]

  monkeypatch.setattr(quadratic, '_MOST_QUERIES', most)
  cotangent = normal(2, length, 2, 3, 5)
  assert_close(run(inputs, cotangent), expect(inputs, cotangent), atol=2e-5)
