"""Metrics of a whole split from its likelihood: perplexities, and what SeqIO evaluates with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_NATS_PER_BIT = float(np.log(2.0))


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
