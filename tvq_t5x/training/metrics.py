"""The metric stream: clu metrics from sums and counts, right under any split of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics

from tvq_t5x.network.mixers import Loss, Ratio
from tvq_t5x.network.transformer import LayerAux

Metrics = dict[str, clu_metrics.Average]

_NATS_PER_BIT = float(np.log(2.0))


def average(total: jax.Array, count: jax.Array | float) -> clu_metrics.Average:
  """A ratio whose parts add up over microbatches, updates and hosts."""
  return clu_metrics.Average(
    total=jnp.asarray(total, jnp.float32),  # pyright: ignore[reportCallIssue]
    count=jnp.asarray(count, jnp.float32),  # pyright: ignore[reportCallIssue]
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


def sublayer_metrics(aux: LayerAux, num_tokens: jax.Array) -> Metrics:
  """Metrics of the sublayers.

  Args:
    aux: of each sublayer of a layer; leaves are [layers].
    num_tokens: that count.

  Returns:
    Each loss, such as `commit_loss`: a token, summed over sublayers. Each ratio, such as
    `codebook_perplexity`, as `NAME/layer_i_j` for sublayer j of layer i, or `NAME/layer_i` where
    only one of a layer has it.
  """
  losses: dict[str, jax.Array | float] = {}
  ratios: dict[str, dict[int, Ratio]] = {}
  for j, sublayer in enumerate(aux):
    for name, said in sublayer.items():
      if isinstance(said, Loss):
        losses[name] = losses.get(name, 0.0) + jnp.sum(said.total)
      elif isinstance(said, Ratio):
        ratios.setdefault(name, {})[j] = said
  metrics = {name: average(total, num_tokens) for name, total in losses.items()}
  for name, found in ratios.items():
    for j, ratio in found.items():
      counts = jnp.broadcast_to(ratio.count, ratio.total.shape)
      for i, (total, count) in enumerate(zip(ratio.total, counts, strict=True)):
        layer = f'layer_{i}' if len(found) == 1 else f'layer_{i}_{j}'
        metrics[f'{name}/{layer}'] = average(total, count)
  return metrics
