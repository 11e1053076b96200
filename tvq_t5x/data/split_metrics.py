"""What SeqIO measures of a split from its likelihood, with the words of the split where known."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio

from tvq_t5x.data import likelihood

# Features of each example of a split: what the whole split has.
_TOKENS, _WORDS = 'split_tokens', 'split_words'


def features(tokens: int, words: int | None) -> dict[str, np.int64]:
  """What the examples of a split say of it, for `Likelihood`; nothing where words are not known."""
  return {_TOKENS: np.int64(tokens), _WORDS: np.int64(words)} if words else {}


class Likelihood(seqio.metrics.PassthroughLegacyMetric.from_metric_fn(likelihood.likelihood)):
  """A task's `metric_objs`: `likelihood.likelihood`, and `word_perplexity` of a whole split."""

  def actual_compute(
    self,
    task_dataset_as_numpy: Iterable[Mapping[str, Any]],
    task_output_features: Mapping[str, seqio.Feature],
    target_field_name: str = 'targets',
    cached_targets: Sequence[str] | None = None,
  ) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """See the base class."""
    found, inferences = super().actual_compute(
      task_dataset_as_numpy, task_output_features, target_field_name, cached_targets
    )
    values = dict(found)
    split = next(iter(task_dataset_as_numpy), {})
    tokens = int(np.sum(inferences['score'][1]['num_tokens'], dtype=np.int64))
    # The words of part of a split are not known.
    if split.get(_TOKENS) == tokens:
      words = int(split[_WORDS])
      nats = values['cross_entropy']
      values['word_perplexity'] = likelihood.word_perplexity(nats, tokens, words)
    return values, inferences
