"""VQ attention as its definition has it, over all pairs of positions: the oracle of the tests."""

import jax
import jax.numpy as jnp

from tvq_t5x.network.attention import MASKED, Queries
from tvq_t5x.network.positions import key_nearness


def dense_attention(
  queries: Queries,
  keys: jax.Array,
  values: jax.Array,
  distances: jax.Array,
  compressed_cache: bool = True,
  block_len: int | None = None,
  grad_through_cache: bool = True,
) -> jax.Array:
  """Softmax attention of T queries to S >= T quantized keys, the last T at the queries' positions.

  Args:
    queries: [B, T, N, G, K].
    keys: [B, S, N, K].
    values: [B, S, N, V].
    distances: [M + 1, N, K]; row d adds to the scores of keys at distance d, further keys get none.
    compressed_cache: whether keys at a distance over M are attended.
    block_len: when given, gradients stop where `vq_attention` with this L stops them: keys older
      than the window of the query's block pass none (their scores come from the codebook).
    grad_through_cache: with block_len, whether earlier blocks' keys and values pass gradient.

  Returns:
    [B, T, N, G, V].
  """
  num_queries, num_keys, window_len = queries.content.shape[1], keys.shape[1], len(distances) - 1
  i = jnp.arange(num_keys - num_queries, num_keys)[:, None]
  j = jnp.arange(num_keys)[None, :]
  f32 = {'preferred_element_type': jnp.float32}

  def content(k):
    return jnp.einsum('BTNGK,BSNK->BNGTS', queries.content, k, **f32)

  scores = content(keys)
  frozen = jax.lax.stop_gradient
  if block_len is not None:
    block_start = i - (i - (num_keys - num_queries)) % block_len
    old = j < block_start - (window_len if grad_through_cache else 0)
    scores = jnp.where(old, content(frozen(keys)), scores)
  scores = scores + key_nearness(queries.position, distances, num_keys)
  visible = (j <= i) if compressed_cache else (j <= i) & (i - j <= window_len)
  weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1)
  weights = weights.astype(values.dtype)
  out = jnp.einsum('BNGTS,BSNV->BTNGV', weights, values, **f32)
  if block_len is not None and not grad_through_cache:
    past = jnp.where(old, weights, 0)
    out = out - jnp.einsum('BNGTS,BSNV->BTNGV', past, values, **f32)
    out = out + jnp.einsum('BNGTS,BSNV->BTNGV', past, frozen(values), **f32)
  return out.astype(values.dtype)
