"""`tiny_bytes`: a task of a few kilobytes that registers itself, in subprocesses too."""

import functools

import numpy as np
import seqio
import tensorflow as tf

from tvq_t5x import datasets
from tvq_t5x.tasks import preprocessors

SIZES = {'train': 6000, 'validation': 700, 'test': 500}


def text(split: str) -> bytes:
  """Words drawn with a seed of the split."""
  rng = np.random.default_rng(len(split))
  words = rng.choice(np.array(['the ', 'sea ', 'and ', 'sky.\n', 'a ', 'ship ']), SIZES[split])
  return ''.join(words).encode()[: SIZES[split]]


def _dataset(split, shuffle_files, seed=None):
  del shuffle_files, seed
  return tf.data.Dataset.from_tensor_slices({'targets': [text(split)]})


seqio.TaskRegistry.add(
  'tiny_bytes',
  source=seqio.FunctionDataSource(_dataset, splits=tuple(SIZES)),
  preprocessors=[
    functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
    seqio.preprocessors.append_eos,
    preprocessors.pack_documents,
  ],
  output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
  metric_fns=[],
  task_cls=datasets.InMemoryTask,
)
