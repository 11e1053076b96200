"""The block in segments, at awkward sizes, beside its definition over all positions at once."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from util import assert_close, call_of, small_config

from tvq_t5x.network.attention import Queries
from tvq_t5x.network.layers import rms_normalize
from tvq_t5x.network.longvq.longvq import LongVQ
from tvq_t5x.network.vq.oracle import dense_attention
from tvq_t5x.network.vq.quantizer import codebook, nearest_codes

B, STATE_SIZE = 2, 4


def recurrence(p, u):
  """The state-space layer position by position; u is [B, T, D]."""
  a = -jnp.exp(p['log_decay']) + 1j * p['frequency']
  step = jnp.exp(jnp.exp(p['log_dt'])[:, None] * a)
  b = (step - 1) / a * (p['b_re'] + 1j * p['b_im'])
  c = 2 * (p['c_re'] + 1j * p['c_im'])

  def position(x, u):
    x = step * x + b * u[..., None]
    return x, jnp.sum(c * x, axis=-1).real + p['d'] * u

  start = jnp.zeros((len(u), *a.shape), jnp.complex64)
  return jnp.moveaxis(jax.lax.scan(position, start, jnp.moveaxis(u, 1, 0))[1], 0, 1)


def dense(config, p, x):
  """The residual branch by the equations of the block's docstring."""

  def project(name, x):
    equation = 'BTD,DHK->BTHK' if p[name]['kernel'].ndim == 3 else 'BTD,DF->BTF'
    return jnp.einsum(equation, x, p[name]['kernel']) + p[name]['bias']

  def affine(name, z):
    affine = p[f'{name}_scale'] * z + p[f'{name}_shift']
    return config.key_dim**-0.25 * rms_normalize(affine)

  normed = rms_normalize(x) * p['norm']['scale'] + p['norm']['bias']
  g = jax.nn.silu(recurrence(p['ssm'], normed))
  z = jax.nn.silu(project('shared', g))
  queries, keys = affine('query', z)[:, :, :, None], affine('key', z)
  table = codebook(**p['quantizer'])
  nearest = table[jnp.arange(table.shape[0]), nearest_codes(keys, table)]
  quantized = nearest + keys - jax.lax.stop_gradient(keys)
  out = dense_attention(
    Queries(queries, queries),
    quantized,
    jax.nn.silu(project('value', normed)),
    p['window_bias'].T,
    block_len=config.block_len,
  )
  gated = jax.nn.silu(project('reset', g)) * out[:, :, :, 0]
  gated = jnp.einsum('BTHV,HVD->BTD', gated, p['out']['kernel'])
  u = jax.nn.sigmoid(project('update', g))
  return u * (jax.nn.silu(project('candidate', g) + gated) - x)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
  blocks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
  rest=st.integers(0, 5),
  block_len=st.integers(1, 6),
  window_len=st.integers(1, 9),
  chunk_len=st.integers(1, 9),
  heads=st.integers(1, 2),
)
def test_segments_are_the_whole_in_value_and_gradient(
  blocks, rest, block_len, window_len, chunk_len, heads
):
  config = small_config(block_len=block_len, window_len=window_len, num_heads=heads)
  block = LongVQ(config, state_size=STATE_SIZE, chunk_len=chunk_len)
  # The last segment may be a part of a block.
  lengths = [n * block_len for n in blocks] + [rest % block_len] * bool(rest % block_len)
  keys = jax.random.split(jax.random.key(sum(lengths)), 3)
  x = jax.random.normal(keys[0], [B, sum(lengths), config.emb_dim])
  params = block.init(keys[1], x[:, :1], None, call_of(jnp.ones([B, 1])))['params']
  params['window_bias'] = jax.random.normal(keys[2], params['window_bias'].shape)
  weights = jax.random.normal(keys[2], x.shape)

  def in_segments(params, x):
    state, parts, start = None, [], 0
    for length in lengths:
      call = call_of(jnp.ones([B, length]), start)
      part = x[:, start : start + length]
      y, state, _ = block.apply({'params': params}, part, state, call)
      parts.append(y)
      start += length
    return jnp.concatenate(parts, axis=1)

  def value_and_gradients(branch):
    def loss(params, x):
      y = branch(params, x)
      return jnp.sum(weights * y), y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

  gradients, y = value_and_gradients(in_segments)
  expected, dense_y = value_and_gradients(lambda params, x: dense(config, params, x))
  assert_close(y, dense_y, atol=1e-4, rtol=1e-4)
  assert_close(gradients, expected, atol=1e-3, rtol=1e-3)
