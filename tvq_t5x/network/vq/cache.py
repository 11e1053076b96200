"""State of an attention sublayer: a window of M positions and a compressed cache of all older ones.

The cache keeps, per key head and code s, how many old keys have code s and the mean of their
values. The mean, not the sum, is kept since it stays bounded (paper, section 3.3).
"""

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tvq_t5x.network import xla
from tvq_t5x.network.config import Reduction, TransformerConfig

X = TypeVar('X')


class CompressedCache(NamedTuple, Generic[X]):
  """Old keys and values, grouped by code; or an X in the place of each array. Any leading axes."""

  counts: X  # [..., N, S] float32
  means: X  # [..., N, S, V] float32, zero where the count is zero


class AttentionState(NamedTuple, Generic[X]):
  """All that a sublayer remembers of the positions before a segment; or an X for each array."""

  codes: X  # [B, M, N] int32; S where the slot is empty
  keys: X  # [B, M, N, K] quantized keys
  values: X  # [B, M, N, V]
  cache: CompressedCache[X]  # [B, N, S], [B, N, S, V]


def init_attention_state(config: TransformerConfig, batch_size: int) -> AttentionState[jax.Array]:
  """The state before the first token: an empty window and an empty cache."""
  window = (batch_size, config.window_len, config.num_kv_heads)
  codes = (batch_size, config.num_kv_heads, config.num_codes)
  return AttentionState(
    codes=jnp.full(window, config.num_codes, jnp.int32),
    keys=jnp.zeros((*window, config.key_dim), config.dtype),
    values=jnp.zeros((*window, config.value_width), config.dtype),
    cache=CompressedCache(
      counts=jnp.zeros(codes, jnp.float32),
      means=jnp.zeros((*codes, config.value_width), jnp.float32),
    ),
  )


def attention_state_axes(config: TransformerConfig) -> AttentionState[PartitionSpec]:
  """Logical axis names of the arrays of an AttentionState."""
  heads = config.heads_axis(config.num_kv_heads)
  window, codes = ('batch', None, heads), ('batch', heads, None)
  return AttentionState(
    codes=PartitionSpec(*window),
    keys=PartitionSpec(*window, 'kv'),
    values=PartitionSpec(*window, config.value_axis),
    cache=CompressedCache(
      counts=PartitionSpec(*codes), means=PartitionSpec(*codes, config.value_axis)
    ),
  )


@jax.named_scope('cache')
def summarize(codes: jax.Array, values: jax.Array, num_codes: int) -> CompressedCache:
  """Compresses the positions of each block.

  Args:
    codes: [B, R, N, L] int32; a code outside [0, S) adds nothing.
    values: [B, R, N, L, V].
    num_codes: S.

  Returns:
    The cache of just these positions, [B, R, N, S] and [B, R, N, S, V].
  """
  one_hot = jax.nn.one_hot(codes, num_codes, dtype=values.dtype)  # [B, R, N, L, S]
  counts = jnp.sum(one_hot, axis=-2, dtype=jnp.float32)
  sums = xla.einsum('BRNLS,BRNLV->BRNSV', one_hot, values, jnp.float32)
  return CompressedCache(counts, sums / jnp.maximum(counts, 1.0)[..., None])


@jax.named_scope('cache')
def counts_by_block(initial: jax.Array, codes: jax.Array) -> jax.Array:
  """Counts of the caches before each block and after the last one.

  Args:
    initial: counts before the first block, [B, N, S].
    codes: of what each block folds in when it is finished, [B, R, N, L] int32, as of `summarize`.

  Returns:
    [B, R + 1, N, S] float32.
  """
  own = xla.total('BRNLS->BRNS', jax.nn.one_hot(codes, initial.shape[-1], dtype=jnp.bfloat16))
  return _running_counts(initial, own)


def _running_counts(initial: jax.Array, own: jax.Array) -> jax.Array:
  """Counts [B, R + 1, N, S] from those before the first block, and those of each block alone."""
  # A product would round counts where the default precision is that of bfloat16.
  return jnp.cumsum(jnp.concatenate([initial[:, None], own], axis=1), axis=1)


def merge(old: CompressedCache, new: CompressedCache) -> CompressedCache:
  """The cache of the union of two disjoint sets of positions. Associative."""
  counts = old.counts + new.counts
  old_share = (old.counts / jnp.maximum(counts, 1.0))[..., None]
  new_share = (new.counts / jnp.maximum(counts, 1.0))[..., None]
  return CompressedCache(counts, old_share * old.means + new_share * new.means)


@jax.named_scope('cache')
def caches_before_blocks(
  initial: CompressedCache,
  codes: jax.Array,
  values: jax.Array,
  num_codes: int,
  reduction: Reduction,
) -> tuple[CompressedCache, CompressedCache]:
  """Runs the reduction over blocks.

  Args:
    initial: the cache before the first block, [B, N, S(, V)].
    codes: of what each block folds in when it is finished, [B, R, N, L] int32, as of `summarize`.
    values: likewise, [B, R, N, L, V].
    num_codes: S.
    reduction: how; the result is the same.

  Returns:
    The cache that each block attends to, [B, R, N, S(, V)], and the cache after the last block.
  """
  if reduction in (Reduction.SERIAL, Reduction.UNROLLED):
    caches = [initial]
    for i in range(codes.shape[1]):
      block = summarize(codes[:, i : i + 1], values[:, i : i + 1], num_codes)
      caches.append(merge(caches[-1], jax.tree.map(lambda x: x[:, 0], block)))
    before = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *caches[:-1])
    return before, caches[-1]

  blocks = summarize(codes, values, num_codes)
  if reduction == Reduction.ASSOCIATIVE:
    parts = jax.tree.map(lambda a, b: jnp.concatenate([a[:, None], b], axis=1), initial, blocks)
    prefixes = jax.lax.associative_scan(merge, parts, axis=1)
    before = jax.tree.map(lambda x: x[:, :-1], prefixes)
    after = jax.tree.map(lambda x: x[:, -1], prefixes)
    return before, after

  # Products with a matrix of blocks by blocks; means are sums again only in here.
  earlier = jnp.tril(jnp.ones([blocks.counts.shape[1]] * 2), -1)
  sums = blocks.means * blocks.counts[..., None]
  initial_sums = initial.means * initial.counts[..., None]
  counts = _running_counts(initial.counts, blocks.counts)
  counts, last_counts = counts[:, :-1], counts[:, -1]
  means = initial_sums[:, None] + jnp.einsum('rp,bpnsv->brnsv', earlier, sums)
  last_means = initial_sums + jnp.sum(sums, axis=1)
  before = CompressedCache(counts, means / jnp.maximum(counts, 1.0)[..., None])
  after = CompressedCache(last_counts, last_means / jnp.maximum(last_counts, 1.0)[..., None])
  return before, after
