"""Bidirectional VQ attention: to all positions of a sequence, in time linear in its length.

A query attends to the keys of its block and of both neighbours, and to everything else compressed
by code, under one softmax. What is compressed for a block is the sequence less those three blocks.
"""

import jax
import jax.numpy as jnp

from tvq_t5x.network.attention import MASKED, Queries
from tvq_t5x.network.vq.attention import Keys, log_counts

_F32 = {'preferred_element_type': jnp.float32}


def bidirectional_attention(
  queries: Queries,
  keys: Keys,
  distances: jax.Array,
  codebook: jax.Array,
  mask: jax.Array,
  block_len: int,
) -> jax.Array:
  """Attends from every position of a sequence to all that are tokens.

  Args:
    queries: [B, T, N, G, K].
    keys: of the sequence, with codes [B, T, N] and values [B, T, N, V].
    distances: [2M + 1, N, K], projected, or [2M + 1, N], scores; row `i - j + M` is of query i and
      key j, further keys get none.
    codebook: [N, S, K] without gradient.
    mask: [B, T], 0 on padding, whose keys nobody attends to.
    block_len: L; any.

  Returns:
    [B, T, N, G, V] in the dtype of the values; without meaning for a sequence without tokens.
  """
  length, num_codes = mask.shape[1], codebook.shape[1]
  block_len = min(block_len, length)
  padding = -length % block_len
  dtype = keys.values.dtype

  def to_blocks(x: jax.Array) -> jax.Array:  # [B, T, ...] to [B, R, L, ...]
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, block_len, *x.shape[2:])

  is_key = to_blocks(mask > 0)
  codes, values = to_blocks(keys.codes), to_blocks(keys.values)
  with jax.named_scope('cache'):
    codes = jnp.where(is_key[..., None], codes, num_codes)
    one_hot = jax.nn.one_hot(codes, num_codes, dtype=dtype)
    counts = jnp.sum(one_hot, axis=2, dtype=jnp.float32)  # [B, R, N, S]
    sums = jnp.einsum('BRLNS,BRLNV->BRNSV', one_hot, values, **_F32)
    far_counts, far_sums = (jnp.sum(x, axis=1, keepdims=True) - _near(x) for x in (counts, sums))
    far_means = far_sums / jnp.maximum(far_counts, 1.0)[..., None]

  content, position = (to_blocks(x) for x in queries)  # [B, R, L, N, G, K]
  near_keys, near_values, is_near = (
    _three_blocks(x) for x in (to_blocks(keys.quantized), values, is_key)
  )
  with jax.named_scope('scores'):
    near = jnp.einsum('BRLNGK,BRJNK->BRNGLJ', content, near_keys, **_F32)
    near = near + _distance_terms(position, distances)
    near = jnp.where(is_near[:, :, None, None, None], near, MASKED)
    far = jnp.einsum('BRLNGK,NSK->BRNGLS', content, codebook.astype(content.dtype), **_F32)
    far = far + log_counts(far_counts)[:, :, :, None, None]
    peak = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (near, far)))
    near, far = (jnp.exp(x - jax.lax.stop_gradient(peak)) for x in (near, far))
    mass = jnp.sum(near, axis=-1) + jnp.sum(far, axis=-1)  # [B, R, N, G, L]
  with jax.named_scope('values'):
    total = jnp.einsum('BRNGLJ,BRJNV->BRLNGV', near.astype(dtype), near_values, **_F32)
    total = total + jnp.einsum('BRNGLS,BRNSV->BRLNGV', far, far_means)
    out = total / jnp.moveaxis(mass, 4, 2)[..., None]
  return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length].astype(dtype)


def _shifted(x: jax.Array, by: int) -> jax.Array:
  """Block r of the result is block r + by of x [B, R, ...]; zero where there is none."""
  sides = [(0, 0)] * x.ndim
  sides[1] = (max(-by, 0), max(by, 0))
  return jnp.pad(x, sides)[:, max(by, 0) : x.shape[1] + max(by, 0)]


def _near(x: jax.Array) -> jax.Array:
  """The sum of each block and its neighbours, [B, R, ...]."""
  return _shifted(x, -1) + x + _shifted(x, 1)


def _three_blocks(x: jax.Array) -> jax.Array:
  """[B, R, L, ...] to [B, R, 3L, ...]: the block before, the block, the one after."""
  return jnp.concatenate([_shifted(x, -1), x, _shifted(x, 1)], axis=2)


def _distance_terms(queries: jax.Array, distances: jax.Array) -> jax.Array:
  """What the distances of near keys add: [B, R, N, G, L, 3L], or what broadcasts to that."""
  block_len, reach = queries.shape[2], len(distances) // 2
  # Of query i and key j, which starts a block before the query's.
  ahead = jnp.arange(block_len)[:, None] - (jnp.arange(3 * block_len) - block_len)[None]
  row = jnp.clip(ahead + reach, 0, 2 * reach)  # [L, 3L]
  if distances.ndim == 2:
    terms = distances.T.astype(jnp.float32)[:, None, row]  # [N, 1, L, 3L]
  else:
    scores = jnp.einsum('BRLNGK,CNK->BRNGLC', queries, distances, **_F32)
    row = jnp.broadcast_to(row, (*scores.shape[:-1], row.shape[-1]))
    terms = jnp.take_along_axis(scores, row, axis=-1)
  return jnp.where(jnp.abs(ahead) <= reach, terms, 0)
