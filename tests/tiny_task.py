"""`tiny_bytes`: a task of a few kilobytes that registers itself, in subprocesses too."""

import numpy as np

from tvq_t5x.data import indexed

SIZES = {'train': 6000, 'validation': 700, 'test': 500}


def text(split: str) -> bytes:
  """Words drawn with a seed of the split."""
  rng = np.random.default_rng(len(split))
  words = rng.choice(np.array(['the ', 'sea ', 'and ', 'sky.\n', 'a ', 'ship ']), SIZES[split])
  return ''.join(words).encode()[: SIZES[split]]


indexed.byte_level_task('tiny_bytes', lambda split: [text(split)], splits=tuple(SIZES))
