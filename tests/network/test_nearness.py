"""What distances add to the scores of a block, on devices where it takes a way of its own."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import assert_close

from tvq_t5x.network import xla
from tvq_t5x.network.vq import nearness

pytestmark = pytest.mark.quick


@pytest.mark.parametrize('length', [1, 2, 5])
@pytest.mark.parametrize('projected', [True, False])
@pytest.mark.parametrize('in_training', [True, False])
def test_folding_changes_nothing(monkeypatch, length, projected, in_training):
  # Memory that nothing was written to has any number in it.
  monkeypatch.setattr(jax.lax, 'empty', lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
  rng = np.random.default_rng(0)
  queries = jnp.asarray(rng.normal(size=(2, 3, 2, 1, length, 4)), jnp.float32)
  shape = (length + 1, 2, 4) if projected else (length + 1, 2)
  distances = jnp.asarray(rng.normal(size=shape), jnp.float32)
  causal = jnp.tril(jnp.ones([length, length]))

  def scores(function):
    def of_keys_up_to_the_query(queries, distances):
      window, present = function(queries, distances)
      return window, present * causal

    return of_keys_up_to_the_query

  context = xla.training_gradients() if in_training else contextlib.nullcontext()
  with context:
    ours, pull_back = jax.vjp(scores(nearness._folded), queries, distances)
  expected, pull_back_expected = jax.vjp(scores(nearness.window_nearness), queries, distances)
  assert_close(ours, expected)
  cotangents = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), expected)
  assert_close(pull_back(cotangents), pull_back_expected(cotangents))
