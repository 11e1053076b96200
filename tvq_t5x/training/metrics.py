"""The metric stream: clu metrics from sums and counts, right under any split of the batch."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics

from tvq_t5x.common import named_arrays
from tvq_t5x.network import sublayers
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.mixers import Loss, Ratio
from tvq_t5x.network.transformer import LayerAux

Metrics = dict[str, clu_metrics.Average]

_USAGE = re.compile(r'(?:^|/)layers(?:_(\d+))?/([^/]+)/(?:.*/)?quantizer/c_count$')

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
    of text; for images, bits per dimension) and `accuracy`, how often no logit is higher than the
    target's.
  """
  count = jnp.sum(weights)
  total = jnp.sum(weights * nats)
  # `argmax` would read the logits once more than the loss, which needs these two, too.
  of_targets = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  hits = jnp.sum(weights * (of_targets == jnp.max(logits, axis=-1)))
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
        metrics[f'{name}/{_place(i, j, len(found))}'] = average(total, count)
  return metrics


def code_usage(params: Mapping[str, Any], config: TransformerConfig) -> dict[str, np.ndarray]:
  """How often each code of each codebook is used, of what `codebook_perplexity` is one number.

  Args:
    params: of the model.
    config: of the model.

  Returns:
    For each codebook, `code_usage/layer_i_j` as in `sublayer_metrics`: averaged counts [N S] as
    multiples of a code's fair part, so that their mean is 1; 0 for codebooks without counts.
  """
  order = [x.name for x in sublayers.of_layer(config)]
  found: dict[int, dict[int, np.ndarray]] = {}
  for name, count in named_arrays.leaves_of(params).items():
    if match := _USAGE.search(name):
      counts = np.asarray(
        jax.device_get(count)
      )  # [N, S], or [layers, N, S] where they are stacked.
      layers = enumerate(counts) if match[1] is None else [(int(match[1]), counts)]
      for i, one in layers:
        fair = np.mean(one, axis=-1, keepdims=True)
        found.setdefault(i, {})[order.index(match[2])] = (one / np.where(fair, fair, 1)).ravel()
  return {
    f'code_usage/{_place(i, j, len(layer))}': usage
    for i, layer in sorted(found.items())
    for j, usage in sorted(layer.items())
  }


def _place(layer: int, sublayer: int, how_many: int) -> str:
  """What a sublayer is called where so many of its layer have something to say."""
  return f'layer_{layer}' if how_many == 1 else f'layer_{layer}_{sublayer}'
