"""Averages of values over window, present block and cache, their gradient block by block.

Values of a block are read three times: by its own queries, by those whose window they are in, and
when they enter the cache. Automatic differentiation has an array of gradients for each, of all
blocks, and adds them; here the three are added while there is one block's.
"""

import functools

import jax
import jax.numpy as jnp

from tvq_t5x.network import xla
from tvq_t5x.network.attention import Values
from tvq_t5x.network.layers import save_for_backward
from tvq_t5x.network.softmax import score_gradients, softmax_weights

_EQUATION = 'BRNGLJ,BRNJV->BRNGLV'
_F32 = {'preferred_element_type': jnp.float32}


@jax.custom_vjp
def average_by_block(
  scores: tuple[jax.Array, jax.Array, jax.Array],
  values: Values,
  window: jax.Array,
  codes: jax.Array,
  counts: jax.Array,
  means: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Averages values with one softmax over window, present block and cache.

  Args:
    scores: of the keys of the window [B, R, N, G, L, M], of the block [B, R, N, G, L, L] and of the
      codes [B, R, N, G, L, S], float32. M is a multiple of L.
    values: of R blocks, [B, R L, N, V].
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
  weights = softmax_weights(scores, window.dtype)
  # Once, for all positions: the projection of the values then writes both.
  active = _to_blocks(xla.computed_once(values.active), codes.shape[1])
  with jax.named_scope('cache'):
    rows = [
      _means(blocks, codes[b], counts[b], means[b])
      for b, blocks in enumerate(_blocks(window, active))
    ]
    # Kept from one array for the products and the backward pass; else XLA would compute two.
    before = _stack([before for before, _ in rows])
    before = save_for_backward(xla.computed_once(before))
    means = jnp.stack([after for _, after in rows])
  with jax.named_scope('values'):
    near = jnp.einsum(_EQUATION, weights[0], _windows(window, active), **_F32)
    # With one axis for B and R, XLA keeps the order of arrays in memory; of two it would turn them.
    others = [[y.reshape(-1, *y.shape[2:]) for y in x] for x in (weights[1:], [active, before])]
    total = xla.sum_of_einsums('PNGLJ,PNJV->PNGLV', *others)
    total = (total + near.reshape(total.shape)).astype(active.dtype)
    out = save_for_backward(total.reshape(near.shape))
  return (out, means), (weights, values, active, window, codes, counts, before, out)


def _means(
  blocks: list[jax.Array], codes: jax.Array, counts: jax.Array, means: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
  """Of a row: the means before each block, in the dtype of the values, and after the last one."""
  before, dtype = [], blocks[0].dtype
  for r in range(len(codes)):
    before.append(means.astype(dtype))
    one_hot = jax.nn.one_hot(codes[r], counts.shape[-1], dtype=dtype)
    sums = jnp.einsum('NLS,NLV->NSV', one_hot, blocks[r], **_F32)
    kept, share = _shares(counts, r)
    means = kept * means + share * sums
  return before, means


@jax.named_scope('values')
def _backward(residuals, gradients):
  weights, values, active, window, codes, counts, means, out = residuals
  g, d_means = gradients
  averaged = [_windows(window, active), active, means]
  d_scores = score_gradients(_EQUATION, weights, averaged, out, g)
  projected = _to_blocks(values.projected, codes.shape[1])
  window_blocks = window.shape[-2] // codes.shape[-1]
  d_rows, d_window, d_initial = [], [], []
  for b in range(len(codes)):
    # Block by block: a slice of a row would be copied.
    of_row = [[y[b, r] for r in range(g.shape[1])] for y in (g, *weights)]
    args = of_row[0], of_row[1:], codes[b], counts[b], d_means[b], window_blocks
    d_blocks, d_row_means = _row_gradients(*args)
    d_window.append(jnp.concatenate(d_blocks[:window_blocks], axis=-2))
    d_rows.append(
      [
        jax.vjp(values.activation, projected[b, r])[1](d)[0]
        for r, d in enumerate(d_blocks[window_blocks:])
      ]
    )
    d_initial.append(d_row_means)
  d_values = values.map(lambda x: jnp.swapaxes(_stack(d_rows), 2, 3).reshape(x.shape))
  return d_scores, d_values, jnp.stack(d_window), None, jnp.zeros_like(counts), jnp.stack(d_initial)


def _row_gradients(
  g: list[jax.Array],
  weights: list[list[jax.Array]],
  codes: jax.Array,
  counts: jax.Array,
  d_means: jax.Array,
  window_blocks: int,
) -> tuple[list[jax.Array], jax.Array]:
  """Of a row: the gradients of its blocks, as `_blocks` has them, and of the means before it.

  `g` and the three `weights` have an array of each block, the others are arrays of the row.
  """
  of_window, of_present, of_codes = weights
  num_blocks, block_len, dtype = len(codes), codes.shape[-1], g[0].dtype

  def gradient(r: int, weights: jax.Array) -> jax.Array:
    """Of values or means, from the queries of block r and their weights, [N, G, L, J]."""
    return jnp.einsum('NGLV,NGLJ->NJV', g[r], weights, **_F32)

  d_blocks = []
  for i in reversed(range(window_blocks + num_blocks)):
    parts = []
    if i < num_blocks:
      kept, share = _shares(counts, i)
      one_hot = jax.nn.one_hot(codes[i], counts.shape[-1], dtype=dtype)
      parts.append(jnp.einsum('NLS,NSV->NLV', one_hot, (share * d_means).astype(dtype), **_F32))
      d_means = kept * d_means + gradient(i, of_codes[i])
    for r in range(max(i - window_blocks + 1, 0), min(i + 1, num_blocks)):
      slot = (i - r) * block_len
      parts.append(gradient(r, of_window[r][..., slot : slot + block_len]))
    if i >= window_blocks:
      parts.append(gradient(i - window_blocks, of_present[i - window_blocks]))
    d_blocks.append(functools.reduce(jnp.add, parts).astype(dtype))
  return d_blocks[::-1], d_means


average_by_block.defvjp(_forward, _backward)


def _to_blocks(x: jax.Array, num_blocks: int) -> jax.Array:
  """[B, R L, N, V] to [B, R, N, L, V]."""
  return jnp.swapaxes(x.reshape(x.shape[0], num_blocks, -1, *x.shape[2:]), 2, 3)


def _blocks(window: jax.Array, values: jax.Array) -> list[list[jax.Array]]:
  """Of each row: blocks of the window before the first one, then all others, [N, L, V] each."""
  before = jnp.split(window, window.shape[-2] // values.shape[-2], axis=-2)
  return [[*(y[b] for y in before), *x] for b, x in enumerate(values)]


def _stack(rows: list[list[jax.Array]]) -> jax.Array:
  """B rows of R blocks to [B, R, ...]."""
  blocks = xla.stack([x for row in rows for x in row])
  return blocks.reshape(len(rows), -1, *blocks.shape[1:])


def _windows(window: jax.Array, values: jax.Array) -> jax.Array:
  """Of each block of the values [B, R, N, L, V]: [B, R, N, M, V]."""
  before = jnp.split(window, window.shape[-2] // values.shape[-2], axis=-2)
  row = jnp.arange(values.shape[1])[:, None, None, None]
  parts = []
  for back in range(len(before), 0, -1):
    # Products read a padded array, and a choice, as they are; slices would be copied first.
    sides = [(0, 0, 0), (back, -back, 0), *[(0, 0, 0)] * 3]
    part = jax.lax.pad(values, jnp.zeros([], values.dtype), sides)
    for r, block in enumerate(before[-back:]):
      part = jnp.where(row == r, block[:, None], part)
    parts.append(part)
  return jnp.concatenate(parts, axis=-2)


def _shares(counts: jax.Array, r: int) -> tuple[jax.Array, jax.Array]:
  """By what old means, and new sums, of a row enter those after block r: [N, S, 1]."""
  share = 1.0 / jnp.maximum(counts[r + 1], 1.0)
  return (counts[r] * share)[..., None], share[..., None]
