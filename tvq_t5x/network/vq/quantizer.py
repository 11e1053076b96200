"""Vector quantization of keys, with codebooks learned by exponential moving averages.

A codebook is `c_sum / max(c_count, 0.01)`. Both are parameters whose gradient is minus the batch
statistics: engines sum gradients over devices and microbatches, so the averages see the whole
global batch whatever the mesh (`optimizers.codebook_ema` then applies the decay once per update).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from jax.nn import initializers

from tvq_t5x.network import xla
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import save_for_backward
from tvq_t5x.network.mixers import Aux, Call, Loss, Ratio, Statistics
from tvq_t5x.network.vq.replacement import MIN_COUNT, NOT_STARTED, set_codes

# A code used less than this share of its fair part of the keys counts as dead.
DEAD_SHARE = 0.01


def codebook_axes(config: TransformerConfig) -> tuple[str, str, str]:
  """Logical axis names of the codes' sums [N, S, K]; their counts have the first two."""
  return config.heads_axis(config.num_kv_heads), 'code', 'kv'


def codebook(c_sum: jax.Array, c_count: jax.Array) -> jax.Array:
  """The codes [N, S, K] float32, without gradient, from their averaged sums and counts."""
  return jax.lax.stop_gradient(c_sum / jnp.maximum(c_count, MIN_COUNT)[..., None])


def nearest_codes(keys: jax.Array, codes: jax.Array) -> jax.Array:
  """`argmin_s |k - C_s|^2`: [..., N] int32 for keys [..., N, K] and codes [N, S, K]."""
  products = jnp.einsum('...nk,nsk->...ns', keys, codes, preferred_element_type=jnp.float32)
  half_norms = 0.5 * jnp.sum(jnp.square(codes), axis=-1)
  return jnp.argmax(products - half_norms, axis=-1).astype(jnp.int32)


def usage_perplexity(counts: jax.Array) -> jax.Array:
  """exp(entropy) of the distribution over codes, mean over heads; counts are [N, S]."""
  total = jnp.sum(counts, axis=-1, keepdims=True)
  shares = counts / jnp.where(total > 0, total, 1.0)  # Codes that have not started have no counts.
  return jnp.mean(jnp.exp(jnp.sum(jax.scipy.special.entr(shares), axis=-1)))


class VectorQuantizer(nn.Module):
  """Quantizes keys to the nearest of S codes per head (paper, section 3.1)."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, keys: jax.Array, call: Call) -> tuple[jax.Array, jax.Array, jax.Array, Aux]:
    """Quantizes.

    Args:
      keys: [B, T, N, K].
      call: positions that its `loss_mask` leaves out count in no loss and no statistic.

    Returns:
      The quantized keys [B, T, N, K] with straight-through gradient, their codes [B, T, N] int32,
      the codebook [N, S, K] float32 without gradient, and by name: `commit_loss`, the sum over
      unmasked positions and heads of |k - C_z|^2; `codebook_statistics`, which bring the batch's
      counts and sums of keys; `codebook_perplexity`, exp(entropy) of the averaged code usage, mean
      over heads, 1 to S; `codebook_dead_codes`, the fraction of codes hardly ever used;
      `quantization_error`, the sum of squared errors over that of squared norms.
    """
    c = self.config
    heads, axes = c.num_kv_heads, codebook_axes(c)
    # Codes that start from keys begin where others do, with averages of next to nothing.
    scale, count = (MIN_COUNT, NOT_STARTED) if c.codes_from_keys else (1.0, 1.0)
    c_sum = nn_partitioning.param_with_axes(
      'c_sum',
      initializers.variance_scaling(scale**2, 'fan_in', 'normal'),
      (heads, c.num_codes, c.key_dim),
      jnp.float32,
      axes=axes,
    )
    c_count = nn_partitioning.param_with_axes(
      'c_count', initializers.constant(count), (heads, c.num_codes), jnp.float32, axes=axes[:2]
    )
    # Distances need every code: gather the codebook once instead of communicating per position.
    table = nn_partitioning.with_sharding_constraint(
      codebook(c_sum, c_count), (axes[0], None, None)
    )
    float_keys = keys.astype(jnp.float32)
    codes = nearest_codes(jax.lax.stop_gradient(float_keys), table)
    codes = save_for_backward(codes, small=True)
    nearest = table[jnp.arange(heads), codes]
    quantized = nearest.astype(keys.dtype) + (keys - jax.lax.stop_gradient(keys))

    mask = call.loss_mask[:, :, None, None]
    commit = jnp.sum(mask * jnp.square(float_keys - nearest))
    masked = jnp.where(call.loss_mask[:, :, None] > 0, codes, c.num_codes)
    one_hot = jax.nn.one_hot(masked, c.num_codes, dtype=jnp.float32)
    batch_count = xla.total('BTNS->NS', one_hot)
    batch_sum = jnp.einsum('btns,btnk->nsk', one_hot, jax.lax.stop_gradient(float_keys))
    if c.codes_from_keys or c.replace_below:
      statistics, averages = jax.lax.stop_gradient(((batch_sum, batch_count), (c_sum, c_count)))
      detached = jax.lax.stop_gradient(keys)
      batch_sum, batch_count = set_codes(statistics, averages, detached, call, c)
    batch_count, batch_sum = (save_for_backward(x, small=True) for x in (batch_count, batch_sum))
    squared_norm = jax.lax.stop_gradient(jnp.sum(mask * jnp.square(float_keys)))
    dead = jnp.mean(c_count < DEAD_SHARE * jnp.mean(c_count, axis=-1, keepdims=True))
    aux = {
      'commit_loss': Loss(commit, c.commit_weight),
      'codebook_statistics': Statistics(
        -jnp.sum(batch_count * _zero(c_count)) - jnp.sum(batch_sum * _zero(c_sum))
      ),
      'codebook_perplexity': Ratio(jax.lax.stop_gradient(usage_perplexity(c_count)), 1.0),
      'codebook_dead_codes': Ratio(dead, 1.0),
      'quantization_error': Ratio(commit, squared_norm),
    }
    return quantized, codes, table, aux


def _zero(x: jax.Array) -> jax.Array:
  """Zero with the gradient of x."""
  return x - jax.lax.stop_gradient(x)
