"""Attention over all pairs of positions, with a cache of keys and values: the baseline."""

import functools
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tvq_t5x.network import xla
from tvq_t5x.network.attention import (
  MASKED,
  Attention,
  Queries,
  Values,
  token_distance_scores,
)
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import SAVE_MARKED, with_sharding_constraint
from tvq_t5x.network.mixers import Aux, Call
from tvq_t5x.network.positions import key_nearness, last_positions, nearness_both_ways
from tvq_t5x.network.softmax import softmax_average

X = TypeVar('X')

# Whose scores are there at the same time. With more, TPUs spend longer on the terms of distances.
_MOST_QUERIES = 512


class KeyValueState(NamedTuple, Generic[X]):
  """The last C positions before a segment, the oldest first; or an X in the place of each array.

  Those that never were are zero.
  """

  keys: X  # [B, C, N, K]
  values: X  # [B, C, N, V]


class KeyValueRing(NamedTuple):
  """A KeyValueState for one token after the other.

  Each position keeps its slot until a new one takes it, and slot 0 follows the last one. Heads come
  first, the order in which products need no transposition.
  """

  keys: jax.Array  # [B, N, C, K]
  values: jax.Array  # [B, N, C, V]


class QuadraticAttention(Attention):
  """Softmax attention to all positions up to a query's, of the segment and of the C before it.

  In an encoder, to all of the sequence.
  """

  def attend(
    self,
    queries: Queries,
    keys: jax.Array,
    values: Values,
    distances: jax.Array,
    state: KeyValueState | KeyValueRing | None,
    call: Call,
  ) -> tuple[jax.Array, KeyValueState | KeyValueRing | tuple[()], Aux]:
    """See `Attention`."""
    return attend(queries, keys, values, distances, state, call, self.config)

  def init_state(self, batch_size: int) -> KeyValueState | tuple[()]:
    """No positions; () in an encoder."""
    return () if self.config.bidirectional else init_key_value_state(self.config, batch_size)

  def state_axes(self) -> KeyValueState[PartitionSpec] | tuple[()]:
    """See `Mixer`."""
    c = self.config
    if c.bidirectional:
      return ()
    heads = c.heads_axis(c.num_kv_heads)
    return KeyValueState(
      *(PartitionSpec('batch', None, heads, width) for width in ('kv', c.value_axis))
    )

  def for_tokens(self, state: KeyValueState) -> KeyValueRing:
    """The positions as a ring, of which a token changes one slot."""
    return KeyValueRing(*(jnp.swapaxes(x, 1, 2) for x in state))

  def from_tokens(self, state: KeyValueRing, steps: jax.Array) -> KeyValueState:
    """The positions in order again."""
    oldest = steps % self.config.kv_cache_len
    return KeyValueState(*(jnp.swapaxes(xla.roll(x, -oldest, 2), 1, 2) for x in state))


def init_key_value_state(config: TransformerConfig, batch_size: int) -> KeyValueState:
  """No positions of B sequences."""
  shape = batch_size, config.kv_cache_len, config.num_kv_heads
  widths = config.key_dim, config.value_width
  return KeyValueState(*(jnp.zeros((*shape, width), config.dtype) for width in widths))


def attend(
  queries: Queries,
  keys: jax.Array,
  values: Values,
  distances: jax.Array,
  state: KeyValueState | KeyValueRing | None,
  call: Call,
  config: TransformerConfig,
) -> tuple[jax.Array, KeyValueState | KeyValueRing | tuple[()], Aux]:
  """`Attention.attend` over keys as they are."""
  active = values.active
  if config.bidirectional:
    return all_pairs_attention(queries, keys, active, distances, call.loss_mask), (), {}
  if isinstance(state, KeyValueRing):
    assert call.step is not None
    args = queries, keys, active, distances, state, call.position, call.step
    return *token_attention(*args, config), {}
  if state is None:
    out = quadratic_attention(queries, keys, active, distances)
    state = init_key_value_state(config, keys.shape[0])
  else:
    all_keys = jnp.concatenate([state.keys, keys], axis=1)
    all_values = jnp.concatenate([state.values, active], axis=1)
    num_empty = jnp.maximum(config.kv_cache_len - call.position, 0)
    out = quadratic_attention(queries, all_keys, all_values, distances, num_empty)
  after = (
    last_positions(jnp.concatenate(pair, axis=1), config.kv_cache_len, call.lengths)
    for pair in zip(state, (keys, active), strict=True)
  )
  return out, KeyValueState(*after), {}


def quadratic_attention(
  queries: Queries,
  keys: jax.Array,
  values: jax.Array,
  distances: jax.Array,
  num_empty: jax.Array | None = None,
) -> jax.Array:
  """Softmax attention of T queries to S >= T keys, the last T at the queries' positions.

  Scores are there for a block of queries at a time, and are computed again for the gradient.

  Args:
    queries: [B, T, N, G, K].
    keys: [B, S, N, K].
    values: [B, S, N, V].
    distances: [M + 1, N, K], or scores [M + 1, N]; row d adds to the scores of keys at distance d,
      further keys get none.
    num_empty: [B] int32, how many of the first keys are none; None means no key.

  Returns:
    [B, T, N, G, V] in the dtype of the values.
  """
  batch_size, length = queries.content.shape[:2]
  if num_empty is None:
    num_empty = jnp.zeros([batch_size], jnp.int32)
  num_blocks = -(-length // _MOST_QUERIES)
  if num_blocks == 1:
    return _attend(queries, keys, values, distances, num_empty)
  block_len = -(-length // num_blocks)
  after = num_blocks * block_len - length  # Padding, of which no query before it sees a key.
  before = (num_blocks - 1) * block_len
  num_keys = keys.shape[1] + after

  def pad(x: jax.Array, before: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))

  queries = jax.tree.map(lambda x: pad(x, 0), queries)
  keys, values = pad(keys, before), pad(values, before)

  def step(_, start):  # Each block sees the keys up to its end, and what is empty before them.
    at = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, axis=1)
    block = jax.tree.map(lambda x: at(x, slice_size=block_len), queries)
    seen_keys, seen_values = (at(x, slice_size=num_keys) for x in (keys, values))
    return None, _attend(block, seen_keys, seen_values, distances, num_empty + before - start)

  step = jax.checkpoint(step, policy=SAVE_MARKED)
  _, out = jax.lax.scan(step, None, jnp.arange(num_blocks, dtype=jnp.int32) * block_len)
  out = jnp.moveaxis(out, 0, 1)  # [B, R, T / R, N, G, V]
  return out.reshape(batch_size, -1, *out.shape[3:])[:, :length]


def _attend(
  queries: Queries,
  keys: jax.Array,
  values: jax.Array,
  distances: jax.Array,
  num_empty: jax.Array,
) -> jax.Array:
  """`quadratic_attention` with the scores of all pairs."""
  num_queries, num_keys = queries.content.shape[1], keys.shape[1]
  with jax.named_scope('scores'):
    scores = xla.einsum('BTNGK,BSNK->BNGTS', queries.content, keys, jnp.float32)
    scores = scores + key_nearness(queries.position, distances, num_keys)
    query = jnp.arange(num_keys - num_queries, num_keys)[:, None]
    key = jnp.arange(num_keys)[None, :]
    visible = (key <= query) & (key >= num_empty[:, None, None, None, None])
    scores = jnp.where(visible, scores, MASKED)
  out = softmax_average('BNGTS,BNSV->BNGTV', [scores], [jnp.swapaxes(values, 1, 2)])
  return jnp.moveaxis(out, 3, 1)


def all_pairs_attention(
  queries: Queries, keys: jax.Array, values: jax.Array, distances: jax.Array, mask: jax.Array
) -> jax.Array:
  """Softmax attention of every position of a sequence to all that are tokens.

  Args:
    queries: [B, T, N, G, K].
    keys: [B, T, N, K].
    values: [B, T, N, V].
    distances: [2M + 1, N, K], or scores [2M + 1, N]; row `i - j + M` adds to the score of query i
      and key j, keys further away get none.
    mask: [B, T], 0 on padding, whose keys nobody attends to.

  Returns:
    [B, T, N, G, V] in the dtype of the values; without meaning for a sequence without tokens.
  """
  f32 = {'preferred_element_type': jnp.float32}
  with jax.named_scope('scores'):
    scores = jnp.einsum('BTNGK,BSNK->BNGTS', queries.content, keys, **f32)
    scores = scores + nearness_both_ways(queries.position, distances)
    scores = jnp.where(mask[:, None, None, None] > 0, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
  with jax.named_scope('values'):
    return jnp.einsum('BNGTS,BSNV->BTNGV', weights, values, **f32).astype(values.dtype)


def token_attention(
  queries: Queries,
  keys: jax.Array,
  values: jax.Array,
  distances: jax.Array,
  state: KeyValueRing,
  position: jax.Array,
  step: jax.Array,
  config: TransformerConfig,
) -> tuple[jax.Array, KeyValueRing]:
  """Attends from one token of each row to itself and the C positions before it. Has no gradient.

  Args:
    queries: of the token, [B, 1, N, G, K].
    keys: [B, 1, N, K].
    values: [B, 1, N, V].
    distances: [M + 1, N, K], as in `quadratic_attention`.
    state: of the positions before the token.
    position: [B] int32, how many those are.
    step: [] int32, tokens since the ring was made: its oldest position is in slot `step % C`.
    config: for C and the placement.

  Returns:
    [B, 1, N, G, V], and the state after the token.
  """
  state = _placed(state, config)
  content, by_position = (x[:, 0] for x in queries)  # [B, N, G, K]
  key, value = keys[:, 0], values[:, 0]
  dtype, f32 = value.dtype, {'preferred_element_type': jnp.float32}
  length, reach = config.kv_cache_len, len(distances) - 1
  oldest = step % length

  nearness = token_distance_scores(by_position, distances)
  # From the oldest position, at distance C, to the newest at distance 1.
  in_order = nearness[..., min(length, reach) : 0 : -1]
  in_order = jnp.pad(in_order, [(0, 0)] * 3 + [(max(length - reach, 0), 0)])
  empty = jnp.arange(length) < length - position[:, None, None, None]
  in_order = jnp.where(empty, MASKED, in_order)
  scores = xla.einsum_of_few_rows('BNGK,BNCK->BNGC', content, state.keys, jnp.float32)
  scores = scores + xla.roll(in_order, oldest, axis=-1)
  own_score = jnp.einsum('BNGK,BNK->BNG', content, key, **f32)[..., None] + nearness[..., :1]

  peak = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), own_score)
  weights, own_weight = jnp.exp(scores - peak), jnp.exp(own_score - peak)
  mass = jnp.sum(weights, axis=-1, keepdims=True) + own_weight
  total = xla.einsum_of_few_rows(
    'BNGC,BNCV->BNGV', weights.astype(dtype), state.values, jnp.float32
  )
  out = ((total + own_weight * value[:, :, None]) / mass).astype(dtype)

  put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=oldest, axis=2)
  # Written in place, after the last look at what was there.
  value = xla.depends_on(jnp.broadcast_to(total[:, :, 0], value.shape), value)
  key = xla.depends_on(jnp.broadcast_to(mass[:, :, 0], key.shape), key)
  new_state = KeyValueRing(put(state.keys, key), put(state.values, value))
  return out[:, None], _placed(new_state, config)


def _placed(state: KeyValueRing, config: TransformerConfig) -> KeyValueRing:
  heads = config.heads_axis(config.num_kv_heads)
  axes = (('batch', heads, None, width) for width in ('kv', config.value_axis))
  return KeyValueRing(*map(with_sharding_constraint, state, axes))
