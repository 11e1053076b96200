"""Averages whose gradient goes block by block, against automatic differentiation and the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import by_oracle, by_segments, make_config, random_inputs
from util import assert_close

from tvq_t5x.network import xla
from tvq_t5x.network.attention import Values
from tvq_t5x.network.config import Reduction
from tvq_t5x.network.layers import silu
from tvq_t5x.network.softmax import softmax_average
from tvq_t5x.network.vq import attention
from tvq_t5x.network.vq.attention import log_counts
from tvq_t5x.network.vq.block_average import average_by_block
from tvq_t5x.network.vq.cache import CompressedCache, caches_before_blocks, counts_by_block

B, N, G, L, V = 2, 2, 3, 4, 6


def plain_average(scores, values, window, codes, counts, means):
  """The same, each of the three reads of the values with gradients of its own."""
  values = jnp.swapaxes(values.active.reshape(B, -1, L, N, V), 2, 3)
  joined = jnp.concatenate([window, *jnp.moveaxis(values, 1, 0)], axis=2)
  starts = [r * L for r in range(values.shape[1])]
  windows = jnp.stack([joined[:, :, i : i + window.shape[2]] for i in starts], axis=1)
  initial = CompressedCache(counts[:, 0], means)
  leaving = windows[..., :L, :]
  num_codes = counts.shape[-1]
  before, after = caches_before_blocks(initial, codes, leaving, num_codes, Reduction.MATMUL)
  args = list(scores), [windows, values, before.means]
  return softmax_average('BRNGLJ,BRNJV->BRNGLV', *args), after.means


@pytest.mark.quick
@pytest.mark.parametrize(
  ('num_blocks', 'window_blocks', 'S'), [(4, 1, 5), (3, 2, 5), (1, 3, 5), (2, 1, L)]
)
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_equals_automatic_differentiation(monkeypatch, platform, num_blocks, window_blocks, S):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  counts = jnp.asarray(rng.integers(0, 4, (B, N, S)), jnp.float32)
  codes = jnp.asarray(rng.integers(0, S + 1, (B, num_blocks, N, L)), jnp.int32)
  counts = counts_by_block(counts, codes)
  scores = [normal(B, num_blocks, N, G, L, j) for j in (window_blocks * L, L, S)]
  scores[2] += log_counts(counts[:, :-1])[..., None, None, :]  # Codes without keys have no weight.
  values = Values(normal(B, num_blocks * L, N, V), silu)
  window = normal(B, N, window_blocks * L, V)
  means = jnp.where(counts[:, 0, ..., None] > 0, normal(B, N, S, V), 0.0)
  cotangents = normal(B, num_blocks, N, G, L, V), normal(B, N, S, V)

  def run(function):
    args = tuple(scores), values, window, means
    out, pull_back = jax.vjp(lambda s, v, w, m: function(s, v, w, codes, counts, m), *args)
    return out, pull_back(cotangents)

  expected = run(plain_average)
  monkeypatch.setattr(xla, 'platform', lambda: platform)
  assert_close(jax.jit(run, static_argnums=0)(average_by_block), expected, atol=2e-5)


@pytest.mark.parametrize(
  ('window_len', 'head_type', 'remat'),
  [(4, 'mqa', 'attention'), pytest.param(8, 'mha', 'layer', marks=pytest.mark.slow)],
)
def test_attention_in_training_equals_the_oracle(monkeypatch, window_len, head_type, remat):
  """Values and gradients, over two segments and the state between them."""
  config = make_config(
    window_len=window_len, head_type=head_type, num_heads=2, remat=remat, reduction='unrolled'
  )
  x, codebook = random_inputs(config, 2, 20)
  weights = np.random.default_rng(1).normal(size=(2, 20, *_heads(config))).astype(np.float32)
  calls = []

  def counted(*args):
    calls.append(args)
    return average_by_block(*args)

  monkeypatch.setattr(attention, 'average_by_block', counted)

  def run(attend, x):
    out, pull_back = jax.vjp(lambda x: attend(config, [12, 8], x, codebook), x)
    return out, pull_back(weights)[0]

  expected = jax.jit(functools.partial(run, by_oracle))(x)
  with xla.training_gradients():
    ours = jax.jit(functools.partial(run, lambda *args: by_segments(*args)[0]))(x)
  assert len(calls) == 2  # One for each segment.
  assert_close(ours, expected, atol=2e-5)


def _heads(config):
  return config.num_kv_heads, config.queries_per_kv_head, config.value_width
