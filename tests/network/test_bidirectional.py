"""Bidirectional VQ attention beside attention over all pairs, at awkward sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from util import assert_close

from tvq_t5x.network.attention import Queries
from tvq_t5x.network.quadratic import all_pairs_attention
from tvq_t5x.network.vq.attention import Keys
from tvq_t5x.network.vq.bidirectional import bidirectional_attention

B, N, G, K, V, S = 2, 2, 3, 4, 5, 3


def draw(length, reach, projected, seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  codebook = normal(N, S, K)
  codes = rng.integers(0, S, (B, length, N), np.int32)
  quantized = codebook[np.arange(N), codes]
  queries = Queries(normal(B, length, N, G, K), normal(B, length, N, G, K))
  distances = normal(2 * reach + 1, N, *([K] if projected else []))
  mask = np.ones([B, length], np.float32)
  mask[1, length - length // 3 :] = 0
  return queries, Keys(quantized, codes, normal(B, length, N, V)), distances, codebook, mask


def dense(queries, keys, distances, mask, block_len):
  """One softmax over all keys that are tokens; a distance adds where both are near."""
  length = mask.shape[1]
  i, j = np.arange(length)[:, None], np.arange(length)[None]
  reach = len(distances) // 2
  row = np.clip(i - j + reach, 0, 2 * reach)
  near = (abs(i - j) <= reach) & (abs(i // block_len - j // block_len) <= 1)
  if distances.ndim == 2:
    terms = jnp.moveaxis(distances[row], 2, 0)[None, :, None]
  else:
    terms = jnp.einsum('BINGK,IJNK->BNGIJ', queries.position, distances[row])
  scores = jnp.einsum('BINGK,BJNK->BNGIJ', queries.content, keys.quantized)
  scores = scores + jnp.where(near, terms, 0)
  scores = jnp.where(mask[:, None, None, None] > 0, scores, -jnp.inf)
  return jnp.einsum('BNGIJ,BJNV->BINGV', jax.nn.softmax(scores, axis=-1), keys.values)


# One program a size compiles faster than its operations one by one.
ours = jax.jit(bidirectional_attention, static_argnums=5)
theirs = jax.jit(dense, static_argnums=4)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(1, 17), st.integers(1, 6), st.integers(0, 9), st.booleans())
def test_it_is_attention_to_all_pairs(length, block_len, reach, projected):
  queries, keys, distances, codebook, mask = draw(length, reach, projected)
  found = ours(queries, keys, distances, codebook, mask, block_len)
  expected = theirs(queries, keys, distances, mask, min(block_len, length))
  shown = mask[..., None, None, None] > 0
  assert_close(jnp.where(shown, found, 0), jnp.where(shown, expected, 0), atol=1e-4, rtol=1e-4)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.integers(1, 17), st.integers(0, 20), st.booleans())
def test_attention_to_unquantized_keys_is_too(length, reach, projected):
  queries, keys, distances, _, mask = draw(length, reach, projected)
  found = jax.jit(all_pairs_attention)(queries, keys.quantized, keys.values, distances, mask)
  expected = theirs(queries, keys, distances, mask, length)
  shown = mask[..., None, None, None] > 0
  assert_close(jnp.where(shown, found, 0), jnp.where(shown, expected, 0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('projected', [False, True])
def test_gradients(projected):
  """Of all but the keys, whose scores from afar come from the codebook."""
  queries, keys, distances, codebook, mask = draw(13, 3, projected)
  weights = mask[..., None, None, None] * jax.random.normal(jax.random.key(7), (B, 13, N, G, V))

  def gradients(attend):
    def loss(queries, values, distances):
      return jnp.sum(weights * attend(queries, keys._replace(values=values), distances))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(queries, keys.values, distances)

  ours = gradients(lambda q, k, d: bidirectional_attention(q, k, d, codebook, mask, 4))
  assert_close(ours, gradients(lambda q, k, d: dense(q, k, d, mask, 4)), atol=1e-4, rtol=1e-4)


def test_padding_is_seen_by_nobody():
  queries, keys, distances, codebook, mask = draw(12, 2, projected=False)
  changed = keys._replace(
    values=jnp.where(mask[..., None, None] > 0, keys.values, 7.0),
    codes=jnp.where(mask[..., None] > 0, keys.codes, (keys.codes + 1) % S),
  )
  out = [ours(queries, k, distances, codebook, mask, 4) for k in (keys, changed)]
  shown = mask > 0
  np.testing.assert_array_equal(out[0][shown], out[1][shown])
