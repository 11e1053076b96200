"""The metric stream: clu metrics from sums and counts, right under any split of the batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics

from tvq_t5x.quantizer import QuantizerAux

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


def word_perplexity(cross_entropy: float, tokens: int, words: int) -> float:
  """Perplexity of words, of a whole split: exp(nats of all tokens / words of its text).

  Unlike the perplexity of tokens, it can be compared between vocabularies.

  Args:
    cross_entropy: nats a token.
    tokens: of the split, EOS included.
    words: of the split.

  Returns:
    It, or infinity where it is too large for a number.
  """
  return perplexity(cross_entropy * tokens / words)


def perplexity(cross_entropy: float) -> float:
  """`exp` of nats; infinity where it is too large for a number."""
  with np.errstate(over='ignore'):
    return float(np.exp(np.float64(cross_entropy)))


def compute(metrics: Mapping[str, clu_metrics.Average]) -> dict[str, float]:
  """The values of metrics, on the host."""
  return {name: float(metric.compute()) for name, metric in metrics.items()}


def likelihood(targets: Sequence[Any], scores: tuple[Any, Mapping[str, Any]]) -> dict[str, float]:
  """SeqIO's metric of a split, for the `metric_fns` of a task: exact, each token counts once.

  Args:
    targets: of the examples; their number is all that is looked at.
    scores: of `TransformerVQModel.score_batch`, the examples' values one after the other.

  Returns:
    `cross_entropy` (nats a token) and, where the model knows the bytes, `bits_per_byte`, as
    `token_metrics` has them.
  """
  log_likelihoods, aux = scores
  if len(targets) != len(log_likelihoods):
    raise ValueError(f'{len(log_likelihoods)} scores for {len(targets)} examples.')
  nats = -np.sum(log_likelihoods, dtype=np.float64)
  values = {'cross_entropy': nats / np.sum(aux['num_tokens'], dtype=np.float64)}
  if 'num_bytes' in aux:
    values['bits_per_byte'] = nats / _NATS_PER_BIT / np.sum(aux['num_bytes'], dtype=np.float64)
  return {name: float(value) for name, value in values.items()}
