"""`lra_text`: whether a film review is positive, from its bytes; 2 classes.

Part of the Long Range Arena. Read from TFDS's `imdb_reviews/plain_text:1.0.0`, 25,000 reviews to
train and 25,000 to test; of each, the first 4,096 bytes.

The arena itself validates on the test split, which a choice between checkpoints or settings then
has seen. Here the last 2,500 reviews of the training split validate, and are not trained on;
`lra_text.corpus.held_out = 0` is what the arena does.
"""

import functools

import seqio

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import classification, corpora, documents, locations
from tvq_t5x.gin_support.configurables import configurable

_MACRO = 'IMDB_PATH'
_NAME = 'imdb_reviews/plain_text:1.0.0'
_SIZE = 25_000
_SPLITS = ('train', 'validation', 'test')


@configurable
def corpus(path: str | None = None, held_out: int = 2500) -> corpora.TfdsCorpus:
  """Where the reviews lie.

  Args:
    path: of TFDS's data directory; macro IMDB_PATH. None means the environment variable IMDB_PATH,
      or else the folder of --data_dir, or else TFDS's default.
    held_out: reviews at the end of the training split that validate; 0 means that the test split
      does.

  Raises:
    ConfigError: if `held_out` is not accepted.
  """
  if isinstance(held_out, bool) or held_out not in range(_SIZE):
    raise ConfigError('lra_text.corpus.held_out', held_out, f'a whole number from 0 to {_SIZE - 1}')
  splits = {'train': 'train', 'validation': 'test', 'test': 'test'}
  if held_out:
    splits |= {'train': f'train[:-{held_out}]', 'validation': f'train[-{held_out}:]'}
  return corpora.TfdsCorpus(_NAME, 'text', splits, locations.data_path(_MACRO, path), _MACRO)


def examples(split: str) -> list[classification.Example]:
  """The reviews of a split."""
  found = corpus()
  return _read(found.data_dir, found.splits[split], found.identity(split)['record'])


@functools.lru_cache(maxsize=3)
def _read(data_dir: str | None, which: str, record: str) -> list[classification.Example]:
  del record  # Another dataset at the same place is another entry of the cache.
  found = corpora.TfdsCorpus(_NAME, 'text', {which: which}, data_dir, _MACRO)
  return [
    classification.Example(example['text'], int(example['label']))
    for example in documents.examples(found.examples(which))
  ]


classification.register(
  'lra_text',
  __name__,
  examples,
  splits=_SPLITS,
  num_classes=2,
  vocabulary=seqio.ByteVocabulary(),
)
