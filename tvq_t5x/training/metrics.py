"""The metric stream: clu metrics from sums and counts, right under any split of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics

from tvq_t5x.network.vq.quantizer import QuantizerAux

Metrics = dict[str, clu_metrics.Average]

_NATS_PER_BIT = float(np.log(2.0))


def average(total: jax.Array, count: jax.Array | float) -> clu_metrics.Average:
  """A ratio whose parts add up over microbatches, updates and hosts."""
  return clu_metrics.Average(
    total=jnp.asarray(total, jnp.float32), count=jnp.asarray(count, jnp.float32)
  )


def token_metrics(
  logits: jax.Array,
  nats: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  bytes_per_token: np.ndarray | None,
) -> Metrics:
  """Metrics of predicted tokens.

  Args:
    logits: [B, T, W].
    nats: [B, T] negative log-likelihood of the targets.
    targets: [B, T] int32.
    weights: [B, T] float32, 0 on padding.
    bytes_per_token: [W] bytes of text, or values of pixels, that a token stands for (0 for EOS);
      None if unknown.

  Returns:
    `cross_entropy` (nats a token), `bits_per_byte` (all nats, those of EOS included, over the bytes
    of text; for images, bits per dimension) and `accuracy`.
  """
  count = jnp.sum(weights)
  total = jnp.sum(weights * nats)
  hits = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets))
  metrics = {'cross_entropy': average(total, count), 'accuracy': average(hits, count)}
  if bytes_per_token is not None:
    num_bytes = jnp.sum(weights * jnp.asarray(bytes_per_token, jnp.float32)[targets])
    metrics['bits_per_byte'] = average(total / _NATS_PER_BIT, num_bytes)
  return metrics


def quantizer_metrics(aux: QuantizerAux, num_tokens: jax.Array) -> Metrics:
  """Metrics of the quantizers; leaves of `aux` are [layers, attention sublayers].

  Returns:
    `commit_loss` (a token, summed over sublayers) and for each layer
    `codebook_perplexity/layer_i_j`, `codebook_dead_codes/...` (fraction) and
    `quantization_error/...`, the sum of squared errors over that of squared norms.
  """
  metrics = {'commit_loss': average(jnp.sum(aux.commit), num_tokens)}
  layers, sublayers = aux.commit.shape
  for i in range(layers):
    for j in range(sublayers):
      name = f'layer_{i}' if sublayers == 1 else f'layer_{i}_{j}'
      metrics[f'codebook_perplexity/{name}'] = average(aux.perplexity[i, j], 1.0)
      metrics[f'codebook_dead_codes/{name}'] = average(aux.dead_codes[i, j], 1.0)
      metrics[f'quantization_error/{name}'] = average(aux.commit[i, j], aux.squared_norm[i, j])
  return metrics
