"""VQ attention: exact softmax attention over quantized keys in time linear in T.

A query of a block attends to three groups of keys under one softmax: the present block, the window
of M positions before it, and the compressed cache of everything older (paper, section 3.2-3.3).
"""

import functools
import math
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from tvq_t5x.network import xla
from tvq_t5x.network.attention import MASKED, Queries, Values
from tvq_t5x.network.config import Reduction, Remat, TransformerConfig
from tvq_t5x.network.layers import SAVE_MARKED, save_for_backward
from tvq_t5x.network.positions import last_positions, window_mask
from tvq_t5x.network.softmax import softmax_average
from tvq_t5x.network.vq.block_average import average_by_block
from tvq_t5x.network.vq.cache import (
  AttentionState,
  CompressedCache,
  caches_before_blocks,
  counts_by_block,
  merge,
  summarize,
)
from tvq_t5x.network.vq.nearness import window_nearness

_X = TypeVar('_X')

# So that memory for the caches and scores of blocks stays bounded. On CPU more are slower.
_BLOCKS_AT_ONCE = 64
_BLOCKS_AT_ONCE_ON_CPU = 8
# More take long to compile.
_MOST_UNROLLED = 32


class Keys(NamedTuple):
  """Quantized keys of a segment and what belongs to them."""

  quantized: jax.Array  # [B, T, N, K], straight-through gradient
  codes: jax.Array  # [B, T, N] int32
  values: jax.Array  # [B, T, N, V]
  projected: Values | None = None  # Where the values come from, if known.


class _Blocks(NamedTuple):
  """Everything that the queries of R blocks attend to, heads before positions."""

  queries: Queries  # [B, R, N, G, L, K]
  present_keys: jax.Array  # [B, R, N, L, K]
  present_values: jax.Array  # [B, R, N, L, V]
  window_keys: jax.Array  # [B, R, N, M, K]
  window_values: jax.Array  # [B, R, N, M, V]
  num_empty: jax.Array  # [B, R] int32, window slots never filled
  leaving_codes: jax.Array  # [B, R, N, L] int32, of the positions that leave the window next


def vq_attention(
  queries: Queries,
  keys: Keys,
  distances: jax.Array,
  codebook: jax.Array,
  state: AttentionState,
  position: jax.Array,
  config: TransformerConfig,
  lengths: jax.Array | None = None,
) -> tuple[jax.Array, AttentionState]:
  """Attends from every position of a segment to all positions up to it.

  Args:
    queries: of the segment, [B, T, N, G, K].
    keys: of the segment, with codes [B, T, N] and values [B, T, N, V].
    distances: [M + 1, N, K], projected sinusoids, or [M + 1, N], scores; row d is of keys at
      distance d.
    codebook: [N, S, K] without gradient.
    state: of the positions before the segment.
    position: [B] int32, how many those are.
    config: for L, M, S, the reduction and the two cache switches.
    lengths: [B] int32, how many positions of each row the state after the segment is of; None means
      all T.

  Returns:
    The values [B, T, N, G, V] averaged with softmax weights, and the state after the segment.
  """
  c = config
  # [B, M + T, N(, K or V)]: the first T of them leave the window, the last M are the next window.
  joined = Keys(
    quantized=jnp.concatenate([state.keys, keys.quantized], axis=1),
    codes=jnp.concatenate([state.codes, keys.codes], axis=1),
    values=jnp.concatenate([state.values, keys.values], axis=1),
  )
  blocks = _to_blocks(queries, keys, joined, position, lengths, c)
  if _gradient_by_block(blocks, c):
    values = keys.projected or Values(keys.values)
    cache, out = _attend_by_block(blocks, values, state, distances, codebook, c)
  else:
    cache, out = _attend_in_groups(blocks, state.cache, distances, codebook, c)
  out = jnp.moveaxis(out, 4, 2)  # [B, R, L, N, G, V]
  codes, quantized = (
    last_positions(x, c.window_len, lengths) for x in (joined.codes, joined.quantized)
  )
  if keys.projected is not None and lengths is None and keys.codes.shape[1] >= c.window_len:
    # Cut first: XLA would write all of them in float32 for the activation.
    values = keys.projected.map(lambda x: x[:, x.shape[1] - c.window_len :]).active
  else:
    values = last_positions(joined.values, c.window_len, lengths)
  new_state = _through_cache(AttentionState(codes, quantized, values, cache), c)
  return out.reshape(*keys.codes.shape, *out.shape[4:]), new_state


def _through_cache(x: _X, config: TransformerConfig) -> _X:
  """Arrays that come from earlier blocks, with gradient where the configuration wants it."""
  return x if config.grad_through_cache else jax.lax.stop_gradient(x)


def _to_blocks(
  queries: Queries,
  keys: Keys,
  joined: Keys,
  position: jax.Array,
  lengths: jax.Array | None,
  c: TransformerConfig,
) -> _Blocks:
  """Cuts a segment into blocks; `joined` has the keys of the window before it, too."""
  length = keys.codes.shape[1]
  num_blocks = c.num_blocks(length)
  block_len = length // num_blocks

  def cut(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], num_blocks, block_len, *x.shape[2:])

  leaving_codes = _leaving_codes(joined, length, lengths, c)
  windows = (_windows(x, num_blocks, block_len) for x in (joined.quantized, joined.values))
  window_keys, window_values = (_heads_first(_through_cache(x, c)) for x in windows)
  return _Blocks(
    queries=jax.tree.map(lambda x: jnp.moveaxis(cut(x), 2, 4), queries),
    present_keys=_heads_first(cut(keys.quantized)),
    present_values=_heads_first(cut(keys.values)),
    window_keys=window_keys,
    window_values=window_values,
    num_empty=jnp.maximum(c.window_len - position[:, None] - jnp.arange(num_blocks) * block_len, 0),
    leaving_codes=_heads_first(cut(leaving_codes)),
  )


def _leaving_codes(
  joined: Keys, length: int, lengths: jax.Array | None, c: TransformerConfig
) -> jax.Array:
  """Of the T positions that leave the window in a segment: [B, T, N], S where there is none."""
  codes = joined.codes[:, :length]
  if lengths is None:
    return codes
  taken = jnp.arange(length) < lengths[:, None]
  return jnp.where(taken[..., None], codes, c.num_codes)


def compress(
  keys: Keys, window: Keys, lengths: jax.Array | None, config: TransformerConfig
) -> CompressedCache:
  """What a segment folds into the cache: all that leaves the window before its end.

  Args:
    keys: of the segment, [B, T, N, ...].
    window: of the M positions before it, [B, M, N, ...].
    lengths: as of `vq_attention`.
    config: likewise.

  Returns:
    The cache of just these positions, [B, N, S] and [B, N, S, V].
  """
  c = config
  batch_size, length, num_heads = keys.codes.shape
  num_blocks = c.num_blocks(length)
  keys = keys._replace(projected=None)
  joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), window, keys)
  values = _through_cache(joined.values[:, :length], c)
  _, at_once = _reduction((batch_size, num_blocks), c)

  def groups(x: jax.Array) -> jax.Array:  # [B, T, N, ...] to [R / g, B, 1, N, g L, ...]
    x = x.reshape(batch_size, num_blocks // at_once, 1, -1, *x.shape[2:])
    return jnp.moveaxis(jnp.swapaxes(x, 3, 4), 1, 0)

  @jax.checkpoint
  def step(cache: CompressedCache, x: tuple[jax.Array, jax.Array]) -> tuple[CompressedCache, None]:
    own = jax.tree.map(lambda leaf: leaf[:, 0], summarize(*x, c.num_codes))
    return merge(cache, own), None

  codes = (batch_size, num_heads, c.num_codes)
  empty = CompressedCache(jnp.zeros(codes), jnp.zeros((*codes, values.shape[-1])))
  codes = _leaving_codes(joined, length, lengths, c)
  return jax.lax.scan(step, empty, (groups(codes), groups(values)))[0]


def _gradient_by_block(x: _Blocks, c: TransformerConfig) -> bool:
  """Whether `average_by_block` is for these blocks."""
  batch_size, num_blocks = x.num_empty.shape
  window_blocks, rest = divmod(c.window_len, x.present_keys.shape[-2])
  reduction, at_once = _reduction(x.num_empty.shape, c)
  return (
    xla.in_training()
    and reduction == Reduction.UNROLLED
    and at_once == num_blocks
    and rest == 0
    and batch_size * (window_blocks + num_blocks) <= 2 * _BLOCKS_AT_ONCE
    and c.compressed_cache
    and c.grad_through_cache
  )


def _attend_by_block(
  x: _Blocks,
  values: Values,
  state: AttentionState,
  distances: jax.Array,
  codebook: jax.Array,
  c: TransformerConfig,
) -> tuple[CompressedCache, jax.Array]:
  """What `_attend_in_groups` returns, with gradients of values block by block."""
  counts = counts_by_block(state.cache.counts, x.leaving_codes)
  scores = _scores(x, counts[:, :-1], distances, codebook, c)
  window = jnp.swapaxes(state.values, 1, 2)  # [B, N, M, V]
  out, means = average_by_block(
    tuple(scores), values, window, x.leaving_codes, counts, state.cache.means
  )
  return CompressedCache(counts[:, -1], means), out


def _attend_in_groups(
  blocks: _Blocks,
  cache: CompressedCache,
  distances: jax.Array,
  codebook: jax.Array,
  c: TransformerConfig,
) -> tuple[CompressedCache, jax.Array]:
  """Attends with as many blocks at once as memory allows, group after group.

  Returns:
    The cache after the last block, and the outputs [B, R, N, G, L, V].
  """
  num_blocks = blocks.num_empty.shape[1]
  reduction, at_once = _reduction(blocks.num_empty.shape, c)
  dtype = blocks.present_values.dtype
  attend = functools.partial(_attend, config=c)
  if c.remat == Remat.ATTENTION and 1 < at_once < num_blocks:
    attend = jax.checkpoint(attend, policy=SAVE_MARKED)

  def step(cache: CompressedCache, x: _Blocks) -> tuple[CompressedCache, jax.Array]:
    values = _leaving_values(x, c)
    before, after = caches_before_blocks(cache, x.leaving_codes, values, c.num_codes, reduction)
    if at_once == num_blocks:
      before = before._replace(means=save_for_backward(before.means.astype(dtype)))
    return after, attend(x, before, distances, codebook)

  if at_once == num_blocks:
    return step(cache, blocks)
  if c.remat == Remat.ATTENTION and at_once == 1:
    # The scan keeps the cache before each block anyway.
    step = jax.checkpoint(step, policy=SAVE_MARKED)

  def groups(x: jax.Array) -> jax.Array:  # [B, R, ...] to [R / g, B, g, ...]
    return jnp.moveaxis(x.reshape(x.shape[0], -1, at_once, *x.shape[2:]), 1, 0)

  cache, out = jax.lax.scan(step, cache, jax.tree.map(groups, blocks))
  out = jnp.moveaxis(out, 0, 1)
  return cache, out.reshape(out.shape[0], -1, *out.shape[3:])


def _reduction(shape: tuple[int, ...], config: TransformerConfig) -> tuple[Reduction, int]:
  """For B rows of R blocks: the reduction, and how many blocks of a row are computed at once.

  That is a divisor of R.
  """
  platform, reduction = xla.platform(), config.reduction
  if reduction == Reduction.AUTO:
    unrolled = platform == 'tpu' and xla.on_one_device() and math.prod(shape) <= _MOST_UNROLLED
    default = Reduction.UNROLLED if unrolled else Reduction.MATMUL
    reduction = Reduction.SERIAL if platform == 'cpu' else default
  most = _BLOCKS_AT_ONCE_ON_CPU if platform == 'cpu' else _BLOCKS_AT_ONCE
  most = 1 if reduction == Reduction.SERIAL else most
  return reduction, max(n for n in range(1, most + 1) if shape[1] % n == 0)


def _leaving_values(x: _Blocks, c: TransformerConfig) -> jax.Array:
  """What each block folds into the cache: the first L positions of its window and of itself."""
  block_len, values = x.leaving_codes.shape[-1], x.window_values
  if block_len > c.window_len:
    values = jnp.concatenate([values, _through_cache(x.present_values, c)], axis=-2)
  return values[..., :block_len, :]


def _attend(
  x: _Blocks,
  cache: CompressedCache,
  distances: jax.Array,
  codebook: jax.Array,
  config: TransformerConfig,
) -> jax.Array:
  """One softmax over window, present block and cache: [B, R, N, G, L, V]."""
  values = [x.window_values, x.present_values]
  if config.compressed_cache:
    values.append(cache.means.astype(x.present_values.dtype))
  scores = _scores(x, cache.counts, distances, codebook, config)
  return softmax_average('BRNGLJ,BRNJV->BRNGLV', scores, values)


@jax.named_scope('scores')
def _scores(
  x: _Blocks,
  counts: jax.Array,
  distances: jax.Array,
  codebook: jax.Array,
  config: TransformerConfig,
) -> list[jax.Array]:
  """Of window and present block [B, R, N, G, L, M or L], and of codes [B, R, N, G, L, S]."""
  block_len, window_len = x.present_keys.shape[-2], x.window_keys.shape[-2]

  def key_scores(keys, near, visible):
    scores: jax.Array = xla.einsum('BRNGLK,BRNJK->BRNGLJ', x.queries.content, keys, jnp.float32)
    return jnp.where(visible, scores + near, MASKED)

  near_window, near_present = window_nearness(x.queries.position, distances)
  in_window, in_present = window_mask(
    block_len,
    window_len,
    x.num_empty[:, :, None, None],
    within_window=not config.compressed_cache,
  )
  scores = [
    key_scores(x.window_keys, near_window, in_window),
    # Else XLA chooses an order in which the product with the values takes longer.
    xla.row_major(key_scores(x.present_keys, near_present, in_present)),
  ]
  if config.compressed_cache:
    codes = codebook.astype(x.present_values.dtype)
    codes = xla.einsum('BRNGLK,NSK->BRNGLS', x.queries.content, codes, jnp.float32)
    scores.append(codes + log_counts(counts)[..., None, None, :])
  return scores


def log_counts(counts: jax.Array) -> jax.Array:
  """What a code's count adds to its score; a code without keys is masked. Any shape."""
  return jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1.0)), MASKED)


def _heads_first(x: jax.Array) -> jax.Array:
  """[B, R, L, N, ...] to [B, R, N, L, ...], the order in which products need no transposition."""
  return jnp.swapaxes(x, 2, 3)


def _windows(x: jax.Array, num_blocks: int, block_len: int) -> jax.Array:
  """The M positions before each block: [B, M + T, ...] to [B, R, M, ...]."""
  window_len = x.shape[1] - num_blocks * block_len
  if num_blocks == 1:
    return x[:, None, :window_len]
  num_chunks = -(-window_len // block_len)
  chunks = x[:, : (num_blocks + num_chunks - 1) * block_len]
  chunks = chunks.reshape(x.shape[0], -1, block_len, *x.shape[2:])
  windows = [chunks[:, i : i + num_blocks] for i in range(num_chunks)]
  return jnp.concatenate(windows, axis=2)[:, :, :window_len]
