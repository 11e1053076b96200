import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from util import assert_close, call_of, small_config

from tvq_t5x.network.vq.quantizer import (
  MIN_COUNT,
  VectorQuantizer,
  codebook,
  nearest_codes,
  usage_perplexity,
)

pytestmark = pytest.mark.quick


@pytest.fixture(scope='module')
def setup():
  config = small_config(head_type='mha', num_heads=2)
  rng = np.random.default_rng(0)
  params = {
    'c_sum': jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32),
    'c_count': jnp.asarray(rng.uniform(0.5, 2, size=(2, 5)), jnp.float32),
  }
  keys = jnp.asarray(rng.normal(size=(3, 6, 2, 4)), jnp.float32)
  mask = jnp.asarray(rng.integers(0, 2, (3, 6)), jnp.float32)
  module = VectorQuantizer(config)

  @jax.jit
  def quantize(params, keys, mask):
    return module.apply({'params': params}, keys, call_of(mask))

  return quantize, params, keys, mask


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
  heads=st.integers(1, 3), num_codes=st.integers(1, 9), width=st.integers(1, 5), seed=st.integers(0)
)
def test_nearest_codes_equal_brute_force(heads, num_codes, width, seed):
  rng = np.random.default_rng(seed)
  keys = rng.normal(size=(2, 7, heads, width)).astype(np.float32)
  # Far from the origin and of different norms: the norms of the codes must count.
  codes = (3 * rng.normal(size=(heads, num_codes, width)) + 1).astype(np.float32)
  ours = np.asarray(nearest_codes(jnp.asarray(keys), jnp.asarray(codes)))
  assert ours.dtype == np.int32
  assert ours.shape == keys.shape[:-1]
  errors = np.square(keys[..., None, :] - codes).sum(-1)  # [..., N, S]
  chosen = np.take_along_axis(errors, ours[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(chosen, errors.min(axis=-1), rtol=1e-4, atol=1e-4)


def test_codebook_is_sum_over_count_without_gradient():
  c_sum = jnp.asarray([[[2.0, 4.0], [1.0, 1.0]]])
  c_count = jnp.asarray([[4.0, MIN_COUNT / 10]])
  # A code that has died keeps a finite place.
  assert_close(codebook(c_sum, c_count), jnp.asarray([[[0.5, 1.0], [1 / 0.01, 1 / 0.01]]]))
  gradients = jax.grad(lambda *args: jnp.sum(codebook(*args)), argnums=(0, 1))(c_sum, c_count)
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0)


def test_quantized_keys_are_codes_with_straight_through_gradient(setup):
  quantize, params, keys, mask = setup
  quantized, codes, table, _ = quantize(params, keys, mask)
  assert_close(table, codebook(**params))
  np.testing.assert_array_equal(codes, nearest_codes(keys, table))
  assert_close(quantized, table[jnp.arange(2), codes])
  weights = jnp.asarray(np.random.default_rng(1).normal(size=keys.shape), jnp.float32)
  by_params, by_keys = jax.grad(
    lambda params, keys: jnp.sum(weights * quantize(params, keys, mask)[0]), argnums=(0, 1)
  )(params, keys)
  np.testing.assert_array_equal(by_keys, weights)
  for leaf in jax.tree.leaves(by_params):
    np.testing.assert_array_equal(leaf, 0)


def test_commitment_leaves_out_padding_and_pulls_keys_to_codes(setup):
  quantize, params, keys, mask = setup
  _, codes, table, aux = quantize(params, keys, mask)
  errors = np.asarray(keys) - np.asarray(table)[np.arange(2), codes]
  weights = np.asarray(mask)[:, :, None, None]
  assert_close(aux['commit_loss'].total, np.sum(weights * errors**2))
  ratio = aux['quantization_error']
  assert_close(ratio.total, aux['commit_loss'].total)
  assert_close(ratio.count, np.sum(weights * np.asarray(keys) ** 2))
  by_params, by_keys = jax.grad(
    lambda params, keys: quantize(params, keys, mask)[3]['commit_loss'].total, argnums=(0, 1)
  )(params, keys)
  assert_close(by_keys, (2 * weights * errors).astype(np.float32))
  for leaf in jax.tree.leaves(by_params):
    np.testing.assert_array_equal(leaf, 0)


def test_statistics_are_zero_with_minus_the_batch_sums_as_gradient(setup):
  quantize, params, keys, mask = setup
  _, codes, _, aux = quantize(params, keys, mask)
  assert aux['codebook_statistics'].zero == 0
  counts, sums = np.zeros((2, 5), np.float32), np.zeros((2, 5, 4), np.float32)
  for b, t, n in np.ndindex(codes.shape):
    counts[n, codes[b, t, n]] += mask[b, t]
    sums[n, codes[b, t, n]] += mask[b, t] * keys[b, t, n]
  by_params, by_keys = jax.grad(
    lambda params, keys: quantize(params, keys, mask)[3]['codebook_statistics'].zero, argnums=(0, 1)
  )(params, keys)
  assert_close(by_params, {'c_count': -counts, 'c_sum': -sums})
  np.testing.assert_array_equal(by_keys, 0)


def test_padding_is_quantized_all_the_same(setup):
  quantize, params, keys, mask = setup
  for ours, expected in zip(
    quantize(params, keys, mask)[:3], quantize(params, keys, jnp.ones_like(mask))[:3], strict=True
  ):
    np.testing.assert_array_equal(ours, expected)


def test_bfloat16_keys_keep_float32_losses(setup):
  quantize, params, keys, mask = setup
  keys = keys.astype(jnp.bfloat16)
  quantized, codes, table, aux = quantize(params, keys, mask)
  assert quantized.dtype == jnp.bfloat16
  assert table.dtype == jnp.float32
  assert all(
    leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(aux) if isinstance(leaf, jax.Array)
  )
  exact = quantize(params, keys.astype(jnp.float32), mask)
  np.testing.assert_array_equal(codes, exact[1])
  losses = (x['commit_loss'].total for x in (aux, exact[3]))
  assert_close(*losses, rtol=1e-4)


@pytest.mark.parametrize(
  ('counts', 'perplexity'),
  [
    ([[1.0, 1, 1, 1]], 4),
    ([[0.0, 7, 0, 0]], 1),
    ([[0.0, 0, 0, 0]], 1),  # Before the first update, where codes start from keys.
    ([[3.0, 0, 3, 0]], 2),
    ([[1.0, 1, 1, 1], [0, 0, 0, 5]], 2.5),
    ([[0.5, 0.25, 0.25, 0]], 2**1.5),
  ],
)
def test_usage_perplexity(counts, perplexity):
  assert_close(usage_perplexity(jnp.asarray(counts)), jnp.float32(perplexity))


@pytest.mark.parametrize(
  ('counts', 'dead'),
  [
    ([[1.0] * 5, [1.0] * 5], 0),
    # A hundredth of the fair share of 20 is 0.2.
    ([[0.19, 0.21, 33, 33, 33.6], [20.0] * 5], 0.1),
    ([[0.0, 0, 0, 0, 1], [0.0, 0, 0, 0, 1e-6]], 0.8),
  ],
)
def test_dead_codes(setup, counts, dead):
  quantize, params, keys, mask = setup
  params = {**params, 'c_count': jnp.asarray(counts, jnp.float32)}
  aux = quantize(params, keys, mask)[3]
  assert_close(aux['codebook_dead_codes'].total, jnp.float32(dead))
  assert 1 <= aux['codebook_perplexity'].total <= 5
