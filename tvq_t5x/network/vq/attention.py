"""VQ attention: exact softmax attention over quantized keys in time linear in T.

A query of a block attends to three groups of keys under one softmax: the present block, the window
of M positions before it, and the compressed cache of everything older (paper, section 3.2-3.3).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tvq_t5x.network.attention import MASKED, Queries, distance_scores
from tvq_t5x.network.config import Reduction, Remat, TransformerConfig
from tvq_t5x.network.layers import SAVE_MARKED, save_for_backward
from tvq_t5x.network.positions import last_positions, relative_shift, window_mask
from tvq_t5x.network.vq.cache import (
  AttentionState,
  CompressedCache,
  caches_before_blocks,
  summarize,
)
from tvq_t5x.network.xla import einsum

# So that time and memory for the caches of blocks stay linear in T.
_MOST_BLOCKS_AT_ONCE = 8


class Keys(NamedTuple):
  """Quantized keys of a segment and what belongs to them."""

  quantized: jax.Array  # [B, T, N, K], straight-through gradient
  codes: jax.Array  # [B, T, N] int32
  values: jax.Array  # [B, T, N, V]


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
  length = keys.codes.shape[1]
  num_blocks = c.num_blocks(length)
  block_len = length // num_blocks

  def to_blocks(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], num_blocks, block_len, *x.shape[2:])

  def maybe_stop_gradient(x):
    return x if c.grad_through_cache else jax.lax.stop_gradient(x)

  # [B, M + T, N(, K or V)]: the first T of them leave the window, the last M are the next window.
  all_codes = jnp.concatenate([state.codes, keys.codes], axis=1)
  all_keys = jnp.concatenate([state.keys, keys.quantized], axis=1)
  all_values = jnp.concatenate([state.values, keys.values], axis=1)
  leaving_codes = all_codes[:, :length]
  if lengths is not None:
    taken = jnp.arange(length) < lengths[:, None]
    leaving_codes = jnp.where(taken[..., None], leaving_codes, c.num_codes)
  blocks = _Blocks(
    queries=jax.tree.map(lambda x: jnp.moveaxis(to_blocks(x), 2, 4), queries),
    present_keys=_heads_first(to_blocks(keys.quantized)),
    present_values=_heads_first(to_blocks(keys.values)),
    window_keys=_heads_first(maybe_stop_gradient(_windows(all_keys, num_blocks, block_len))),
    window_values=_heads_first(maybe_stop_gradient(_windows(all_values, num_blocks, block_len))),
    num_empty=jnp.maximum(c.window_len - position[:, None] - jnp.arange(num_blocks) * block_len, 0),
    leaving_codes=_heads_first(to_blocks(leaving_codes)),
  )

  def leaving(x: _Blocks) -> CompressedCache:
    values = jnp.concatenate([x.window_values, maybe_stop_gradient(x.present_values)], axis=-2)
    return summarize(x.leaving_codes, values[..., :block_len, :], c.num_codes)

  def attend(x: _Blocks, cache: CompressedCache) -> jax.Array:
    return _attend(x, cache, distances, codebook, c)

  def step(cache: CompressedCache, x: _Blocks) -> tuple[CompressedCache, jax.Array]:
    before, after = caches_before_blocks(cache, leaving(x), c.reduction)
    return after, attend(x, before)

  at_once = _blocks_at_once(num_blocks, c.reduction)
  if c.remat == Remat.ATTENTION and at_once == 1:
    # The scan keeps the cache before each block anyway.
    step = jax.checkpoint(step, policy=SAVE_MARKED)
  elif c.remat == Remat.ATTENTION:
    attend = jax.checkpoint(attend, policy=SAVE_MARKED)
  if at_once == num_blocks:
    cache, out = step(state.cache, blocks)
  else:
    cache, out = _scan_blocks(step, state.cache, blocks, at_once)
  out = jnp.moveaxis(out, 4, 2)  # [B, R, L, N, G, V]

  def window(x: jax.Array) -> jax.Array:
    return last_positions(x, c.window_len, lengths)

  new_state = maybe_stop_gradient(
    AttentionState(window(all_codes), window(all_keys), window(all_values), cache)
  )
  return out.reshape(out.shape[0], length, *out.shape[3:]), new_state


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


def _blocks_at_once(num_blocks: int, reduction: Reduction) -> int:
  """How many blocks have their caches at the same time: a divisor of their number."""
  most = 1 if reduction == Reduction.SERIAL else _MOST_BLOCKS_AT_ONCE
  return max(n for n in range(1, most + 1) if num_blocks % n == 0)


def _scan_blocks(
  step: Callable[[CompressedCache, _Blocks], tuple[CompressedCache, jax.Array]],
  cache: CompressedCache,
  blocks: _Blocks,
  at_once: int,
) -> tuple[CompressedCache, jax.Array]:
  """Attends group after group; returns the last cache and the outputs [B, R, N, G, L, V]."""

  def groups(x: jax.Array) -> jax.Array:  # [B, R, ...] to [R / g, B, g, ...]
    return jnp.moveaxis(x.reshape(x.shape[0], -1, at_once, *x.shape[2:]), 1, 0)

  cache, out = jax.lax.scan(step, cache, jax.tree.map(groups, blocks))
  out = jnp.moveaxis(out, 0, 1)
  return cache, out.reshape(out.shape[0], -1, *out.shape[3:])


def _attend(
  x: _Blocks,
  cache: CompressedCache,
  distances: jax.Array,
  codebook: jax.Array,
  c: TransformerConfig,
) -> jax.Array:
  """One softmax over window, present block and cache: [B, R, N, G, L, V]."""
  dtype = x.present_values.dtype
  block_len, window_len = x.present_keys.shape[-2], x.window_keys.shape[-2]
  f32 = {'preferred_element_type': jnp.float32}

  nearness = distance_scores(x.queries.position, distances[::-1])
  nearness = relative_shift(nearness, window_len + block_len)
  visible = window_mask(block_len, window_len, x.num_empty, within_window=not c.compressed_cache)
  visible = visible[:, :, None, None]  # [B, R, N, G, L, M + L]

  def key_scores(keys, part):
    scores: jax.Array = einsum('BRNGLK,BRNJK->BRNGLJ', x.queries.content, keys, jnp.float32)
    return jnp.where(visible[..., part], scores + nearness[..., part], MASKED)

  scores = [
    key_scores(x.window_keys, slice(window_len)),
    key_scores(x.present_keys, slice(window_len, None)),
  ]
  values = [x.window_values, x.present_values]
  if c.compressed_cache:
    codes = codebook.astype(x.present_keys.dtype)
    codes = jnp.einsum('BRNGLK,NSK->BRNGLS', x.queries.content, codes, **f32)
    scores.append(codes + log_counts(cache.counts)[..., None, None, :])
    values.append(cache.means.astype(dtype))

  peaks = [jnp.max(group, axis=-1, keepdims=True) for group in scores]
  peak = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks))
  peak = save_for_backward(peak)
  weights = [jnp.exp(group - peak) for group in scores]
  mass = sum(jnp.sum(group, axis=-1, keepdims=True) for group in weights)
  total = sum(
    jnp.einsum('BRNGLJ,BRNJV->BRNGLV', group.astype(dtype), group_values, **f32)
    for group, group_values in zip(weights, values, strict=True)
  )
  mass = save_for_backward(mass)
  total = save_for_backward(total)
  return (total / mass).astype(dtype)
