"""VQ attention against attention to all pairs of positions, and that against a loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from util import assert_close

from tvq_t5x.network import xla
from tvq_t5x.network.config import Reduction, TransformerConfig
from tvq_t5x.network.vq import attention
from tvq_t5x.network.vq.attention import Keys, Queries, log_counts, vq_attention
from tvq_t5x.network.vq.cache import init_attention_state
from tvq_t5x.network.vq.oracle import dense_attention

REDUCTIONS = [reduction for reduction in Reduction if reduction != Reduction.AUTO]


def make_config(**overrides):
  fields = {
    'vocab_size': 2,
    'emb_dim': 2,
    'key_dim': 3,
    'value_dim': 2,
    'num_layers': 1,
    'num_codes': 3,
    'block_len': 4,
    'window_len': 3,
    'head_type': 'mha',
  }
  return TransformerConfig(**{**fields, **overrides})


def random_inputs(config, batch_size, length, seed=0, scale=1.0):
  """What attention is a differentiable function of, with biases u and w apart, and a codebook."""
  c, rng = config, np.random.default_rng(seed)
  n, g, k = c.num_kv_heads, c.queries_per_kv_head, c.key_dim
  shapes = {
    'q': (batch_size, length, n, g, k),
    'u': (n, g, k),
    'w': (n, g, k),
    'keys': (batch_size, length, n, k),
    'values': (batch_size, length, n, c.value_width),
    'distances': (c.window_len + 1, n, k),
  }
  inputs = {
    name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
  }
  return inputs, jnp.asarray(rng.normal(size=(n, c.num_codes, k)), jnp.float32)


def quantize(keys, codebook):
  errors = jnp.sum(jnp.square(keys[..., None, :] - codebook), axis=-1)
  codes = jnp.argmin(errors, axis=-1)
  nearest = codebook[jnp.arange(len(codebook)), codes]
  # Straight through: the value of the code, the gradient of the key.
  return nearest + keys - jax.lax.stop_gradient(keys), codes


def queries_of(x):
  return Queries(content=x['q'] + x['u'], position=x['q'] + x['w'])


def by_segments(config, lengths, x, codebook, dtype=jnp.float32):
  """Outputs [B, T, ...] and the last state of vq_attention over successive segments."""
  x = jax.tree.map(lambda a: a.astype(dtype), x)
  quantized, codes = quantize(x['keys'], codebook.astype(dtype))
  arrays = (queries_of(x), Keys(quantized, codes, x['values']))
  state = init_attention_state(config, len(codes))
  outputs, start = [], 0
  for length in lengths:
    queries, keys = jax.tree.map(lambda a, s=start, n=length: a[:, s : s + n], arrays)
    position = jnp.full([len(codes)], start, jnp.int32)
    out, state = vq_attention(queries, keys, x['distances'], codebook, state, position, config)
    outputs.append(out)
    start += length
  return jnp.concatenate(outputs, axis=1), state


def by_oracle(config, lengths, x, codebook):
  """The same outputs from all pairs of positions: each segment attends to the whole history."""
  quantized, _ = quantize(x['keys'], codebook)
  queries = queries_of(x)
  outputs, start = [], 0
  for length in lengths:
    end = start + length
    out = dense_attention(
      jax.tree.map(lambda a, s=start, e=end: a[:, s:e], queries),
      quantized[:, :end],
      x['values'][:, :end],
      x['distances'],
      config.compressed_cache,
      min(config.block_len, length),
      config.grad_through_cache,
    )
    outputs.append(out)
    start = end
  return jnp.concatenate(outputs, axis=1)


def assert_equals_oracle(config, lengths, batch_size, seed, reductions):
  x, codebook = random_inputs(config, batch_size, sum(lengths), seed)
  heads = (config.num_kv_heads, config.queries_per_kv_head, config.value_width)
  weights = np.random.default_rng(seed + 1).normal(size=(batch_size, sum(lengths), *heads))
  attends = {'oracle': lambda x: by_oracle(config, lengths, x, codebook)}
  for reduction in reductions:
    c = dataclasses.replace(config, reduction=reduction)
    attends[reduction] = lambda x, c=c: by_segments(c, lengths, x, codebook)[0]

  @jax.jit
  def run(x):
    def value_and_gradients(attend):
      out, pull_back = jax.vjp(attend, x)
      return out, pull_back(weights.astype(np.float32))[0]

    return {name: value_and_gradients(attend) for name, attend in attends.items()}

  results = run(x)
  expected = results.pop('oracle')
  for result in results.values():
    assert_close(result, expected, atol=2e-5)


@st.composite
def cases(draw):
  block_len = draw(st.sampled_from([1, 3, 5, 8]))
  whole = st.integers(1, 3).map(lambda r: r * block_len)
  shorter = st.integers(1, max(block_len - 1, 1))
  lengths = draw(st.lists(whole | shorter, min_size=1, max_size=2))
  config = make_config(
    block_len=block_len,
    window_len=draw(st.integers(1, 11)),
    num_codes=draw(st.integers(1, 4)),
    head_type=draw(st.sampled_from(['gated', 'mha', 'mqa'])),
    num_heads=draw(st.integers(1, 3)),
    compressed_cache=draw(st.booleans()),
    grad_through_cache=draw(st.booleans()),
    remat=draw(st.sampled_from(['none', 'attention'])),
  )
  reduction = draw(st.sampled_from(Reduction))
  return config, lengths, draw(st.integers(1, 2)), draw(st.integers(0, 999)), [reduction]


# Every example compiles anew: few of them, and no search for a smaller one when one fails.
@pytest.mark.quick
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(cases())
def test_equals_oracle_on_awkward_sizes(case):
  assert_equals_oracle(*case)


@pytest.mark.parametrize(
  ('lengths', 'overrides'),
  [
    # The window is longer than a block and no multiple of it; the last segments are short.
    pytest.param(
      [12, 2, 1], {'window_len': 7, 'head_type': 'mqa', 'num_heads': 3}, marks=pytest.mark.slow
    ),
    # The window is shorter than a block, and no gradient leaves a block.
    ([8, 3, 8], {'grad_through_cache': False, 'num_heads': 2, 'remat': 'none'}),
    # Keys within the window but too far from the query are left out.
    ([4, 1, 8], {'compressed_cache': False, 'window_len': 6}),
    # More blocks than have their caches at once: 10 of them in two groups, then 11, which is prime.
    ([20, 22, 1], {'block_len': 2, 'num_heads': 2}),
  ],
)
def test_every_reduction_equals_oracle(lengths, overrides):
  assert_equals_oracle(make_config(**overrides), lengths, 2, 0, REDUCTIONS)


def test_state_does_not_depend_on_segments_or_block_length():
  config = make_config(num_heads=2, window_len=5)
  x, codebook = random_inputs(config, 2, 12)
  states = []
  for block_len, reduction, lengths in [
    (12, 'matmul', [12]),
    (4, 'associative', [8, 4]),
    (3, 'serial', [6, 2, 1, 3]),
    (5, 'matmul', [1] * 12),
  ]:
    c = dataclasses.replace(config, block_len=block_len, reduction=reduction)
    run = jax.jit(lambda x, c=c, n=lengths: by_segments(c, n, x, codebook)[1])
    states.append(run(x))
  for state in states[1:]:
    assert_close(state, states[0])
  # Everything is somewhere: 5 positions in the window, 7 in the cache.
  np.testing.assert_array_equal(states[0].cache.counts.sum(-1), 7)
  _, codes = quantize(x['keys'], codebook)
  np.testing.assert_array_equal(states[0].codes, codes[:, -5:])
  np.testing.assert_array_equal(states[0].values, x['values'][:, -5:])


@pytest.mark.quick
@pytest.mark.parametrize('grad_through_cache', [True, False])
def test_gradient_through_the_state_itself(grad_through_cache):
  config = make_config(grad_through_cache=grad_through_cache)
  x, codebook = random_inputs(config, 1, 8)

  @jax.jit
  @jax.grad
  def gradient(x):
    state = by_segments(config, [8], x, codebook)[1]
    return jnp.sum(state.keys) + jnp.sum(state.values) + jnp.sum(state.cache.means)

  passed = gradient(x)
  # The window holds keys and values, the cache values only.
  assert np.all(passed['values'] != 0) == grad_through_cache
  assert np.all(passed['keys'][:, -3:] != 0) == grad_through_cache
  assert not np.any(passed['keys'][:, :-3])
  if not grad_through_cache:
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(passed))


def test_state_before_the_window_is_full():
  config = make_config(window_len=7)
  x, codebook = random_inputs(config, 1, 4)
  _, state = jax.jit(lambda x: by_segments(config, [4], x, codebook))(x)
  # Empty slots come first and have no code; nothing is in the cache.
  assert np.all(state.codes[:, :3] == config.num_codes)
  assert np.all(state.codes[:, 3:] < config.num_codes)
  assert not np.any(state.cache.counts)
  assert not np.any(state.cache.means)


def test_rows_may_be_at_different_positions():
  config = make_config(window_len=6)
  x, codebook = random_inputs(config, 2, 12)
  quantized, codes = quantize(x['keys'], codebook)
  history = [3, 8]
  queries, keys = queries_of(x), Keys(quantized, codes, x['values'])

  def run(rows, starts, length, state):
    part = jax.tree.map(
      lambda a: jnp.stack([a[i, s : s + length] for i, s in zip(rows, starts, strict=True)]),
      (queries, keys),
    )
    return vq_attention(*part, x['distances'], codebook, state, jnp.array(starts), config)

  @jax.jit
  def both():
    empty = init_attention_state(config, 1)
    states = [run([i], [0], n, empty)[1] for i, n in enumerate(history)]
    alone = [run([i], [n], 4, states[i]) for i, n in enumerate(history)]
    state, alone = (
      jax.tree.map(lambda *a: jnp.concatenate(a), *parts) for parts in (states, alone)
    )
    return run([0, 1], history, 4, state), alone

  assert_close(*both())


def loop_attention(x, quantized, compressed_cache):
  """Softmax attention, one query at a time."""
  q, values, distances = (np.asarray(x[name]) for name in ('q', 'values', 'distances'))
  u, w = np.asarray(x['u']), np.asarray(x['w'])
  out = np.zeros((*q.shape[:-1], values.shape[-1]))
  for b, i, n, g in np.ndindex(q.shape[:-1]):
    first = 0 if compressed_cache else max(0, i - len(distances) + 1)
    scores = []
    for j in range(first, i + 1):
      scores.append((q[b, i, n, g] + u[n, g]) @ quantized[b, j, n])
      if i - j < len(distances):
        scores[-1] += (q[b, i, n, g] + w[n, g]) @ distances[i - j, n]
    weights = np.exp(scores - np.max(scores))
    out[b, i, n, g] = weights @ values[b, first : i + 1, n] / weights.sum()
  return out


@pytest.mark.quick
@pytest.mark.parametrize('window_len', [2, 9])
@pytest.mark.parametrize('compressed_cache', [True, False])
@pytest.mark.parametrize('head_type', ['mha', 'mqa'])
def test_oracle_equals_a_loop(head_type, compressed_cache, window_len):
  config = make_config(head_type=head_type, num_heads=2, window_len=window_len)
  x, codebook = random_inputs(config, 2, 8)
  quantized, _ = quantize(x['keys'], codebook)
  expected = loop_attention(x, np.asarray(quantized), compressed_cache)
  args = (quantized, x['values'], x['distances'], compressed_cache)
  assert_close(dense_attention(queries_of(x), *args), expected.astype(np.float32))
  # Where gradients stop changes no value.
  stopped = dense_attention(queries_of(x), *args, 4, False)
  assert_close(stopped, expected.astype(np.float32))
  # The last queries alone: more keys than queries.
  last = jax.tree.map(lambda a: a[:, 5:], queries_of(x))
  assert_close(dense_attention(last, *args), expected[:, 5:].astype(np.float32))


def test_large_scores_stay_exact():
  config = make_config(reduction='serial')
  x, codebook = random_inputs(config, 1, 12, scale=10.0)

  @jax.jit
  def run(x):
    out, pull_back = jax.vjp(lambda x: by_segments(config, [12], x, codebook)[0], x)
    return out, by_oracle(config, [12], x, codebook), pull_back(out)

  out, expected, gradients = run(x)
  # Scores in the hundreds, of which float32 keeps 1e-4 at best.
  assert_close(out, expected, atol=2e-3, rtol=1e-3)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_bfloat16_is_close_and_counts_are_exact(reduction):
  config = make_config(
    block_len=301, num_codes=2, dtype='bfloat16', reduction=reduction, remat='none'
  )
  x, _ = random_inputs(config, 1, 602)
  # Keys far from a tie, of two codes of which the first is frequent: past 512, bfloat16 has only
  # multiples of 4.
  codebook = jnp.asarray([[[1.0] * 3, [-1.0] * 3]])
  code = np.arange(602) % 10 == 9
  x['keys'] = jnp.where(jnp.asarray(code)[None, :, None, None], -1.0, 1.0) * jnp.ones(
    [1, 602, 1, 3]
  )

  @jax.jit
  def run(x):
    exact = dataclasses.replace(config, dtype='float32')
    return [by_segments(c, [602], x, codebook, c.dtype) for c in (config, exact)]

  (out, state), (expected, exact) = run(x)
  assert out.dtype == state.keys.dtype == state.values.dtype == jnp.bfloat16
  assert state.cache.counts.dtype == state.cache.means.dtype == jnp.float32
  np.testing.assert_array_equal(state.cache.counts[0, 0], np.bincount(code[:599]))
  # Values and weights of 8 bits: an average of values near 1 is within a few 1e-2.
  assert_close(out, expected.astype(jnp.bfloat16), atol=4e-2, rtol=2e-2)
  assert_close(state.cache, exact.cache, atol=1e-2)


@pytest.mark.parametrize(
  ('platform', 'num_devices', 'shape', 'expected'),
  [
    ('cpu', 1, (1, 10), (Reduction.SERIAL, 1)),
    ('gpu', 1, (1, 96), (Reduction.MATMUL, 48)),
    ('tpu', 1, (2, 16), (Reduction.UNROLLED, 16)),
    ('tpu', 1, (3, 16), (Reduction.MATMUL, 16)),
    ('tpu', 2, (2, 16), (Reduction.MATMUL, 16)),
  ],
)
def test_what_auto_is(monkeypatch, platform, num_devices, shape, expected):
  monkeypatch.setattr(xla, 'platform', lambda: platform)
  with jax.set_mesh(Mesh(jax.devices()[:num_devices], 'data')):
    assert attention._reduction(shape, make_config()) == expected


def test_log_counts():
  counts = jnp.asarray([0.0, 1.0, 2.0, 1e6])
  ours, gradient = jax.value_and_grad(lambda x: log_counts(x)[0])(counts)
  assert np.exp(ours) == 0
  assert np.all(np.isfinite(gradient))
  assert_close(log_counts(counts)[1:], jnp.log(counts[1:]))
