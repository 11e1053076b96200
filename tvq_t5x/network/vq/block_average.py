"""Averages of values over window, present block and cache, their gradient block by block.

Values of a block are read three times: by its own queries, by those whose window they are in, and
when they enter the cache. Automatic differentiation has an array of gradients for each, of all
blocks, and adds them; here the three are added while there is one block's.
"""

import functools

import jax
import jax.numpy as jnp

from tvq_t5x.network import xla
from tvq_t5x.network.layers import save_for_backward
from tvq_t5x.network.softmax import score_gradients, softmax_weights, weighted_sum

_EQUATION = 'BRNGLJ,BRNJV->BRNGLV'
_F32 = {'preferred_element_type': jnp.float32}


@jax.custom_vjp
def average_by_block(
  scores: tuple[jax.Array, jax.Array, jax.Array],
  values: jax.Array,
  window: jax.Array,
  codes: jax.Array,
  counts: jax.Array,
  means: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Averages values with one softmax over window, present block and cache.

  Args:
    scores: of the keys of the window [B, R, N, G, L, M], of the block [B, R, N, G, L, L] and of the
      codes [B, R, N, G, L, S], float32. M is a multiple of L.
    values: of R blocks, [B, R, N, L, V].
    window: values of the M positions before the first block, [B, N, M, V].
    codes: [B, R, N, L] int32, of the L positions that each block folds into the cache, the oldest
      of its window; S where there is none.
    counts: of the caches before each block and after the last one, [B, R + 1, N, S], without
      gradient.
    means: of the cache before the first block, [B, N, S, V] float32.

  Returns:
    [B, R, N, G, L, V] in the dtype of the values, and the means of the cache after the last block.
  """
  return _forward(scores, values, window, codes, counts, means)[0]


def _forward(scores, values, window, codes, counts, means):
  num_blocks = values.shape[1]
  weights = softmax_weights(scores, values.dtype)
  all_before = []
  with jax.named_scope('cache'):
    blocks = _blocks(window, values)
    for r in range(num_blocks):
      all_before.append(means.astype(values.dtype))
      one_hot = _one_hot(codes[:, r], counts, values.dtype)
      sums = jnp.einsum('BNLS,BNLV->BNSV', one_hot, blocks[r], **_F32)
      kept, share = _shares(counts, r)
      means = kept * means + share * sums
    # Kept from one array for the products and the backward pass; else XLA would compute two.
    before = save_for_backward(xla.computed_once(jnp.stack(all_before, axis=1)))
  out = weighted_sum(_EQUATION, weights, [_windows(window, values), values, before])
  return (out, means), (weights, values, window, codes, counts, before, out)


@jax.named_scope('values')
def _backward(residuals, gradients):
  weights, values, window, codes, counts, means, out = residuals
  g, d_means = gradients
  num_blocks, dtype = values.shape[1], values.dtype
  windows = _windows(window, values)
  d_scores = score_gradients(_EQUATION, weights, [windows, values, means], out, g)
  of_window, of_present, of_codes = weights
  block_len, window_blocks = values.shape[-2], window.shape[-2] // values.shape[-2]

  def gradient(r: int, weights: jax.Array) -> jax.Array:
    """Of values or means, from the queries of block r and their weights, [B, N, G, L, J]."""
    return jnp.einsum('BNGLV,BNGLJ->BNJV', g[:, r], weights, **_F32)

  d_blocks = []
  for i in reversed(range(window_blocks + num_blocks)):  # As `_blocks` counts them.
    parts = []
    if i < num_blocks:
      kept, share = _shares(counts, i)
      one_hot = _one_hot(codes[:, i], counts, dtype)
      d_sums = (share * d_means).astype(dtype)
      parts.append(jnp.einsum('BNLS,BNSV->BNLV', one_hot, d_sums, **_F32))
      d_means = kept * d_means + gradient(i, of_codes[:, i])
    for r in range(max(i - window_blocks + 1, 0), min(i + 1, num_blocks)):
      slot = (i - r) * block_len
      parts.append(gradient(r, of_window[:, r, ..., slot : slot + block_len]))
    if i >= window_blocks:
      parts.append(gradient(i - window_blocks, of_present[:, i - window_blocks]))
    d_blocks.append(functools.reduce(jnp.add, parts).astype(dtype))
  d_blocks.reverse()
  d_window = jnp.concatenate(d_blocks[:window_blocks], axis=-2)
  d_values = jnp.stack(d_blocks[window_blocks:], axis=1)
  return d_scores, d_values, d_window, None, jnp.zeros_like(counts), d_means


average_by_block.defvjp(_forward, _backward)


def _blocks(window: jax.Array, values: jax.Array) -> list[jax.Array]:
  """Those of the window before the first block, then the blocks: [B, N, L, V] each."""
  window_blocks = window.shape[-2] // values.shape[-2]
  before = jnp.split(window, window_blocks, axis=-2)
  return before + [values[:, r] for r in range(values.shape[1])]


def _windows(window: jax.Array, values: jax.Array) -> jax.Array:
  """Of each block: [B, R, N, M, V]."""
  num_blocks, block_len = values.shape[1], values.shape[-2]
  window_blocks = window.shape[-2] // block_len
  before = jnp.stack(jnp.split(window, window_blocks, axis=-2), axis=1)
  blocks = jnp.concatenate([before, values[:, :-1]], axis=1)
  return jnp.concatenate([blocks[:, i : i + num_blocks] for i in range(window_blocks)], axis=-2)


def _one_hot(codes: jax.Array, counts: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """[B, N, L] to [B, N, L, S]."""
  return jax.nn.one_hot(codes, counts.shape[-1], dtype=dtype)


def _shares(counts: jax.Array, r: int) -> tuple[jax.Array, jax.Array]:
  """By what old means, and new sums, enter the means after block r: [B, N, S, 1]."""
  share = 1.0 / jnp.maximum(counts[:, r + 1], 1.0)
  return (counts[:, r] * share)[..., None], share[..., None]
