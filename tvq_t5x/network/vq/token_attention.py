"""VQ attention of one token, with its state updated in place.

The same values as `vq_attention` with T = 1, in the time that it takes to read the state once: the
window is a ring, in which the new position takes the slot of the oldest one, and the cache changes
in one row. The window's keys aren't read at all, since a code's score is that of all its keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tvq_t5x.network import xla
from tvq_t5x.network.attention import MASKED, Queries, token_distance_scores
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import with_sharding_constraint
from tvq_t5x.network.vq.attention import Keys, log_counts
from tvq_t5x.network.vq.cache import AttentionState, CompressedCache, attention_state_axes
from tvq_t5x.network.xla import depends_on


class RingState(NamedTuple):
  """An AttentionState for one token after the other. Any leading axes `...`.

  The window is a ring: each position keeps its slot until a new one takes it, and slot 0 follows
  the last one. Heads come first, the order in which products need no transposition.
  """

  codes: jax.Array  # [..., N, M] int32; S where the slot is empty
  keys: jax.Array  # [..., N, M, K]
  values: jax.Array  # [..., N, M, V]
  cache: CompressedCache


def to_ring(state: AttentionState) -> RingState:
  """The same state, with the window's oldest position in slot 0."""
  return RingState(
    codes=jnp.swapaxes(state.codes, -1, -2),
    keys=jnp.swapaxes(state.keys, -2, -3),
    values=jnp.swapaxes(state.values, -2, -3),
    cache=state.cache,
  )


def in_order(ring: RingState, oldest: jax.Array | int) -> AttentionState:
  """The same state, given the slot of the window's oldest position."""
  return AttentionState(
    codes=jnp.swapaxes(xla.roll(ring.codes, -oldest, -1), -1, -2),
    keys=jnp.swapaxes(xla.roll(ring.keys, -oldest, -2), -2, -3),
    values=jnp.swapaxes(xla.roll(ring.values, -oldest, -2), -2, -3),
    cache=ring.cache,
  )


def token_attention(
  queries: Queries,
  keys: Keys,
  distances: jax.Array,
  codebook: jax.Array,
  state: RingState,
  oldest: jax.Array,
  config: TransformerConfig,
) -> tuple[jax.Array, RingState]:
  """Attends from one token of each row to itself and all positions before it. Has no gradient.

  Args:
    queries: of the token, [B, 1, N, G, K].
    keys: of the token, with codes [B, 1, N] and values [B, 1, N, V]; quantized by `codebook`, as
      those of the state are.
    distances: [M + 1, N, K], projected sinusoids, or [M + 1, N], scores; row d is of keys at
      distance d.
    codebook: [N, S, K].
    state: of the positions before the token, [B, N, ...].
    oldest: [] int32, the slot of the window's oldest position.
    config: for M, S and the cache switch.

  Returns:
    The values [B, 1, N, G, V] averaged with softmax weights, and the state after the token, in
    which the slot after `oldest` is the oldest one.
  """
  state = _placed(state, config)
  content, position = (x[:, 0] for x in queries)  # [B, N, G, K]
  code, key, value = keys.codes[:, 0], keys.quantized[:, 0], keys.values[:, 0]
  dtype, f32 = value.dtype, {'preferred_element_type': jnp.float32}

  code_scores = jnp.einsum('BNGK,NSK->BNGS', content, codebook.astype(dtype), **f32)
  nearness = token_distance_scores(position, distances)

  def scores_of(codes):  # [B, N, J] to [B, N, G, J]; an empty slot has no code and is masked.
    codes = codes[:, :, None]
    return jnp.take_along_axis(code_scores, codes, axis=-1, mode='fill', fill_value=MASKED)

  # Distances M to 1 are those of the slots from the oldest one on.
  window_nearness = xla.roll(nearness[..., :0:-1], oldest, axis=-1)
  window_scores = scores_of(state.codes) + window_nearness
  own_score = scores_of(code[..., None]) + nearness[..., :1]
  cache_scores = code_scores + log_counts(state.cache.counts)[:, :, None]
  if not config.compressed_cache:
    cache_scores = jnp.full_like(cache_scores, MASKED)
  groups = [window_scores, own_score, cache_scores]
  peaks = [jnp.max(group, axis=-1, keepdims=True) for group in groups]
  peak = functools.reduce(jnp.maximum, peaks)
  weights, own_weight, cache_weights = (jnp.exp(group - peak) for group in groups)
  mass = jnp.sum(weights, axis=-1, keepdims=True) + own_weight
  mass = mass + jnp.sum(cache_weights, axis=-1, keepdims=True)

  average = functools.partial(xla.einsum_of_few_rows, dtype=jnp.float32)
  total = average('BNGJ,BNJV->BNGV', weights.astype(dtype), state.values)
  cached = average('BNGS,BNSV->BNGV', cache_weights, state.cache.means)
  out = ((total + own_weight * value[:, :, None] + cached) / mass).astype(dtype)

  old_code = jax.lax.dynamic_index_in_dim(state.codes, oldest, 2, keepdims=False)
  old_value = jax.lax.dynamic_index_in_dim(state.values, oldest, 2, keepdims=False)
  old_value, old_mean = xla.read_rows(old_value, _row(state.cache.means, old_code))
  has_code = jax.nn.one_hot(old_code, config.num_codes, dtype=bool)
  counts = state.cache.counts + has_code
  count = jnp.sum(jnp.where(has_code, counts, 0), axis=-1, keepdims=True)
  mean = old_mean + (old_value - old_mean) / jnp.maximum(count, 1)
  new_state = RingState(
    codes=_put(state.codes, code, oldest),
    keys=_put(state.keys, key, oldest),
    values=_put(state.values, depends_on(total[:, :, 0], depends_on(old_value, value)), oldest),
    cache=CompressedCache(
      counts, _set_row(state.cache.means, old_code, depends_on(cached[:, :, 0], mean))
    ),
  )
  return out[:, None], _placed(new_state, config)


def _placed(state: RingState, config: TransformerConfig) -> RingState:
  """Where `attention_state_axes` has it on devices: they would else exchange whole windows."""
  axes = attention_state_axes(config)
  window = [
    PartitionSpec(batch, heads, slot, *width) for batch, slot, heads, *width in map(tuple, axes[:3])
  ]
  return jax.tree.map(with_sharding_constraint, state, RingState(*window, cache=axes.cache))


def _put(window: jax.Array, row: jax.Array, slot: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(window, row.astype(window.dtype), slot, 2)


def _row(means: jax.Array, code: jax.Array) -> jax.Array:
  """The row of a code [B, N] in means [B, N, S, V]; zero for a code outside [0, S)."""
  code = code[:, :, None, None]
  return jnp.take_along_axis(means, code, axis=2, mode='fill', fill_value=0)[:, :, 0]


def _set_row(means: jax.Array, code: jax.Array, row: jax.Array) -> jax.Array:
  """Replaces the row of a code [B, N] in means [B, N, S, V]; a code outside [0, S) has none."""
  set_one = jax.vmap(jax.vmap(lambda m, c, r: m.at[c].set(r, mode='drop')))
  return set_one(means, code, row)
