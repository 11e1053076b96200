"""The compressed cache against a loop over positions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from util import assert_close, small_config

from tvq_t5x.network.config import Reduction
from tvq_t5x.network.vq.cache import (
  CompressedCache,
  caches_before_blocks,
  counts_by_block,
  init_attention_state,
  merge,
  summarize,
)

CODES = 4
REDUCTIONS = [reduction for reduction in Reduction if reduction != Reduction.AUTO]


def positions(rng, *shape):
  """Codes and values; the last code is never used, and slots with code S are empty."""
  codes = rng.choice([*range(CODES - 1), CODES], shape)
  return jnp.asarray(codes, jnp.int32), jnp.asarray(rng.normal(size=(*shape, 3)), jnp.float32)


def loop_summary(codes, values):
  """Counts and means over positions [L, N] of one example."""
  counts = np.zeros((codes.shape[1], CODES), np.float32)
  sums = np.zeros((codes.shape[1], CODES, values.shape[-1]), np.float32)
  for i, n in np.ndindex(codes.shape):
    if codes[i, n] < CODES:
      counts[n, codes[i, n]] += 1
      sums[n, codes[i, n]] += values[i, n]
  return CompressedCache(counts, sums / np.maximum(counts, 1)[..., None])


def loop_caches(codes, values, num_old, block_len):
  """The cache before each block and after the last one, for positions [B, num_old + T, N]."""
  ends = range(num_old, codes.shape[1] + 1, block_len)
  caches = [
    [loop_summary(codes[b, :end], values[b, :end]) for end in ends] for b in range(len(codes))
  ]
  stacked = [jax.tree.map(lambda *x: np.stack(x), *row) for row in caches]
  caches = jax.tree.map(lambda *x: np.stack(x), *stacked)
  return jax.tree.map(lambda x: x[:, :-1], caches), jax.tree.map(lambda x: x[:, -1], caches)


def summary(codes, values):
  """Of positions [..., L, N]."""
  codes, values = jnp.swapaxes(codes, -1, -2), jnp.swapaxes(values, -2, -3)
  outer, blocks = codes.shape[:-2], (1, math.prod(codes.shape[:-2]))
  ours = summarize(
    codes.reshape(*blocks, *codes.shape[-2:]), values.reshape(*blocks, *values.shape[-3:]), CODES
  )
  return jax.tree.map(lambda x: x.reshape(*outer, *x.shape[2:]), ours)


def reduce_blocks(codes, values, num_old, block_len, reduction):
  def to_blocks(x):
    return x.reshape(x.shape[0], -1, block_len, *x.shape[2:])

  initial = summary(codes[:, :num_old], values[:, :num_old])
  blocks = (jnp.swapaxes(to_blocks(x[:, num_old:]), 2, 3) for x in (codes, values))
  return caches_before_blocks(initial, *blocks, CODES, reduction)


@functools.partial(jax.jit, static_argnums=(2, 3))
def reduce_every_way(codes, values, num_old, block_len):
  return [reduce_blocks(codes, values, num_old, block_len, reduction) for reduction in REDUCTIONS]


@pytest.mark.quick
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
  block_len=st.integers(1, 4),
  num_blocks=st.integers(1, 6),
  num_heads=st.integers(1, 2),
  num_old=st.sampled_from([0, 5]),
)
def test_reductions_equal_a_loop(block_len, num_blocks, num_heads, num_old):
  rng = np.random.default_rng(0)
  codes, values = positions(rng, 2, num_old + block_len * num_blocks, num_heads)
  expected = loop_caches(np.asarray(codes), np.asarray(values), num_old, block_len)
  for ours in reduce_every_way(codes, values, num_old, block_len):
    assert_close(ours, expected)
  initial = summary(codes[:, :num_old], values[:, :num_old]).counts
  blocks = codes[:, num_old:].reshape(2, num_blocks, block_len, num_heads)
  counts = counts_by_block(initial, jnp.swapaxes(blocks, 2, 3))
  before, after = expected
  np.testing.assert_array_equal(counts[:, :-1], before.counts)
  np.testing.assert_array_equal(counts[:, -1], after.counts)


def test_reductions_have_the_same_gradient():
  rng = np.random.default_rng(0)
  codes, values = positions(rng, 2, 5 + 4 * 3, 2)
  cotangent = jnp.asarray(rng.normal(size=(2, 5, 2, CODES, 3)), jnp.float32)

  def gradient(reduction):
    def loss(values):
      before, after = reduce_blocks(codes, values, 5, 3, reduction)
      means = jnp.concatenate([before.means, after.means[:, None]], axis=1)
      return jnp.sum(means * cotangent)

    return jax.jit(jax.grad(loss))(values)

  # A mean passes its cotangent, over the count, to each of the positions that it averages.
  expected = np.zeros(values.shape, np.float32)
  for b, i, n in np.ndindex(codes.shape):
    for r, end in enumerate(range(5, 18, 3)):
      if i < end and codes[b, i, n] < CODES:
        count = np.sum(codes[b, :end, n] == codes[b, i, n])
        expected[b, i, n] += cotangent[b, r, n, codes[b, i, n]] / count
  for reduction in REDUCTIONS:
    assert_close(gradient(reduction), expected)


def test_codes_without_keys():
  """Their mean is zero, not NaN, and so is all gradient, also to values in empty slots."""
  codes = jnp.full([1, 6, 1], CODES)
  values = jnp.ones([1, 6, 1, 3])
  for caches in reduce_every_way(codes, values, 2, 2):
    for leaf in jax.tree.leaves(caches):
      np.testing.assert_array_equal(leaf, 0)
  total = jax.grad(
    lambda v: sum(jnp.sum(after.means) for _, after in reduce_every_way(codes, v, 2, 2))
  )
  np.testing.assert_array_equal(total(values), 0)


def test_merge_is_associative_with_the_empty_cache_as_identity():
  rng = np.random.default_rng(0)
  codes, values = positions(rng, 3, 5, 2)
  a, b, c = (summary(codes[i], values[i]) for i in range(3))
  assert_close(merge(merge(a, b), c), merge(a, merge(b, c)))
  union = loop_summary(
    np.asarray(codes[:2]).reshape(10, 2), np.asarray(values[:2]).reshape(10, 2, 3)
  )
  assert_close(merge(a, b), union)
  empty = jax.tree.map(jnp.zeros_like, a)
  assert_close(merge(empty, a), a)
  assert_close(merge(a, empty), a)


def test_bfloat16_values_are_counted_and_averaged_in_float32():
  # One code with 301 keys: bfloat16 has no odd numbers past 256.
  values = jnp.ones([1, 1, 1, 301, 2], jnp.bfloat16)
  cache = summarize(jnp.zeros([1, 1, 1, 301], jnp.int32), values, 2)
  assert cache.counts.dtype == cache.means.dtype == jnp.float32
  np.testing.assert_array_equal(cache.counts, [[[[301, 0]]]])
  np.testing.assert_array_equal(cache.means, [[[[[1, 1], [0, 0]]]]])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_initial_state_is_empty(dtype):
  config = small_config(head_type='mqa', num_heads=2, dtype=dtype)
  state = init_attention_state(config, 7)
  assert np.all(state.codes == config.num_codes)
  assert state.codes.shape == (7, 3, 1)
  assert state.keys.shape == (7, 3, 1, 4)
  assert state.values.shape == (7, 3, 1, 6)
  assert state.keys.dtype == state.values.dtype == jnp.dtype(dtype)
  assert state.cache.counts.shape == (7, 1, 5)
  assert state.cache.means.shape == (7, 1, 5, 6)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.cache))
