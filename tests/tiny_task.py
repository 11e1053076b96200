"""Tasks of a few kilobytes that register themselves, in subprocesses too.

`tiny_bytes`, and the same text in the pieces of SENTENCEPIECE_MODEL, `tiny_pieces`.
"""

import numpy as np
import seqio

from tvq_t5x.data import indexed, vocabularies

SIZES = {'train': 6000, 'validation': 700, 'test': 500}


def text(split: str) -> bytes:
  """Words drawn with a seed of the split."""
  rng = np.random.default_rng(len(split))
  words = rng.choice(np.array(['the ', 'sea ', 'and ', 'sky.\n', 'a ', 'ship ']), SIZES[split])
  return ''.join(words).encode()[: SIZES[split]]


indexed.byte_level_task('tiny_bytes', lambda split: [text(split)], splits=tuple(SIZES))

indexed.register(
  'tiny_pieces',
  __name__,
  source=indexed.text_source(lambda split: [text(split)], tuple(SIZES)),
  preprocessors=indexed.text_preprocessors(),
  output_features={'targets': seqio.Feature(vocabularies.SentencePieceVocabulary())},
  task_cls=indexed.InMemoryTask,
)
