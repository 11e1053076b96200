"""Bidirectional VQ attention: to all positions of a sequence, in time linear in its length.

A query attends to the keys of its block and of both neighbours, and to everything else compressed
by code, under one softmax. What is compressed for a block is the sequence less those three blocks.
"""

import functools

import jax
import jax.numpy as jnp

from tvq_t5x.network import sequence
from tvq_t5x.network.attention import MASKED, Queries
from tvq_t5x.network.sequence import Part
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
  args = queries, keys, mask
  attend = functools.partial(_attend, block_len=block_len)
  if sequence.num_parts(mask.shape[1], unit=block_len) == 1:
    return attend(None, args, (), (distances, codebook))[0]
  return sequence.on_parts(attend, args, (), (distances, codebook))[0]


def _attend(
  part: Part | None,
  sequences: tuple[Queries, Keys, jax.Array],
  states: tuple[()],
  shared: tuple[jax.Array, jax.Array],
  block_len: int,
) -> tuple[jax.Array, tuple[()]]:
  """`bidirectional_attention` of all positions, or of the part of a device."""
  del states
  (queries, keys, mask), (distances, codebook) = sequences, shared
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
    far_counts, far_sums = (_total(x, part) - sum((x, *_beside(x, part))) for x in (counts, sums))
    far_means = far_sums / jnp.maximum(far_counts, 1.0)[..., None]

  content, position = (to_blocks(x) for x in queries)  # [B, R, L, N, G, K]
  near_keys, near_values, is_near = (
    _three_blocks(x, part) for x in (to_blocks(keys.quantized), values, is_key.astype(jnp.int32))
  )
  with jax.named_scope('scores'):
    near = jnp.einsum('BRLNGK,BRJNK->BRNGLJ', content, near_keys, **_F32)
    near = near + _distance_terms(position, distances)
    near = jnp.where(is_near[:, :, None, None, None] > 0, near, MASKED)
    far = jnp.einsum('BRLNGK,NSK->BRNGLS', content, codebook.astype(content.dtype), **_F32)
    far = far + log_counts(far_counts)[:, :, :, None, None]
    peak = jnp.maximum(*(jnp.max(x, axis=-1, keepdims=True) for x in (near, far)))
    near, far = (jnp.exp(x - jax.lax.stop_gradient(peak)) for x in (near, far))
    mass = jnp.sum(near, axis=-1) + jnp.sum(far, axis=-1)  # [B, R, N, G, L]
  with jax.named_scope('values'):
    total = jnp.einsum('BRNGLJ,BRJNV->BRLNGV', near.astype(dtype), near_values, **_F32)
    total = total + jnp.einsum('BRNGLS,BRNSV->BRLNGV', far, far_means)
    out = total / jnp.moveaxis(mass, 4, 2)[..., None]
  return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length].astype(dtype), ()


def _total(x: jax.Array, part: Part | None) -> jax.Array:
  """The sum of all blocks [B, R, ...] of a sequence, [B, 1, ...]."""
  total = jnp.sum(x, axis=1, keepdims=True)
  return jax.lax.psum(total, part.axis) if part else total


def _beside(x: jax.Array, part: Part | None) -> tuple[jax.Array, jax.Array]:
  """The blocks before and after each of [B, R, ...]; zero where there is none."""
  first = last = jnp.zeros_like(x[:, :1])
  if part:
    first = part.from_previous(first, x[:, -1:])
    last = part.mirrored.from_previous(last, x[:, :1])
  return jnp.concatenate([first, x[:, :-1]], axis=1), jnp.concatenate([x[:, 1:], last], axis=1)


def _three_blocks(x: jax.Array, part: Part | None) -> jax.Array:
  """[B, R, L, ...] to [B, R, 3L, ...]: the block before, the block, the one after."""
  before, after = _beside(x, part)
  return jnp.concatenate([before, x, after], axis=2)


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
