"""Tasks that keep their tokens in an array in a folder or bucket, made when they are first read."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import seqio

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import documents, locations, token_store, vocabularies
from tvq_t5x.data.documents import Counts, Document, Piece
from tvq_t5x.data.indexed import IndexedSplit, IndexedTask
from tvq_t5x.gin_support.configurables import configurable


@configurable
def directory(path: str | None = None) -> str | None:
  """The folder of the token caches, macro TOKEN_CACHE_DIR.

  Args:
    path: of a folder, local or in a bucket (gs:// or s3://); None means the environment variable
      TOKEN_CACHE_DIR, or else `token_cache` in the folder of the data.
  """
  return locations.path(token_store.MACRO, path)


class CachedTask(IndexedTask):
  """An `IndexedTask` whose tokens lie in a `token_store.TokenStore` for each split.

  They are written when a split is first read, together by all processes that read it. The store's
  name follows from the corpus and the vocabulary, so that no other is ever taken for it.
  """

  def __init__(self, *args: Any, corpus: Callable[[], Any], first_id: int = 0, **kwargs: Any):
    """Creates the task; reads nothing.

    Args:
      *args: as `IndexedTask`'s.
      corpus: returns where the documents lie: a `Corpus`, unless a subclass reads another.
      first_id: lowest id that a document has.
      **kwargs: as `IndexedTask`'s.
    """
    super().__init__(*args, **kwargs)
    self._corpus, self._first_id = corpus, first_id

  def read(self, split: str) -> IndexedSplit:
    """See the base class.

    Raises:
      ConfigError: if the corpus is not there, or the store can't be read or written.
    """
    corpus, store = self._place(split)
    complete = store.complete_parts()
    while len(complete) < store.num_parts:
      part, which = store.begin(complete)
      store.write(part, self._documents(corpus, split, which))
      complete = store.complete_parts()
      if part not in complete:
        raise ConfigError(
          f'{token_store.MACRO}: {store.folder} does not keep what is written there.'
        )
    return store.open(complete)

  def find(self, split: str) -> None:
    """See the base class."""
    self._place(split)

  def survey(self, split: str) -> Counts | None:
    """See the base class; None unless all tokens are there."""
    _, store = self._place(split)
    complete = store.complete_parts()
    return store.open(complete).counts if len(complete) == store.num_parts else None

  def _shares(self, corpus: Any, split: str) -> tuple[int, int]:
    """How many documents a split has, and how few a part may have."""
    return corpus.num_documents(split), 50

  def _documents(self, corpus: Any, split: str, which: range) -> Iterator[Document | Piece]:
    """Some of the documents of a split, in order."""
    source = seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: corpus.dataset(split, which.start, which.stop),
      splits=tuple(self.splits),
    )
    return documents.documents(self.replace(source=source), split)

  def _place(self, split: str) -> tuple[Any, token_store.TokenStore]:
    corpus, vocabulary = self._corpus(), self.output_features['targets'].vocabulary
    identity = {
      **corpus.identity(split),
      'vocabulary': vocabularies.identity(vocabulary),
      'first_id': self._first_id,
      'dtype': str(np.min_scalar_type(vocabulary.vocab_size - 1 - self._first_id)),
    }
    folder = directory() or os.path.join(corpus.folder, locations.TOKEN_CACHE)
    name = f'{self.name}-{split}'
    ids = range(self._first_id, vocabulary.vocab_size)
    shares = self._shares(corpus, split)
    return corpus, token_store.TokenStore(folder, name, identity, ids, *shares)
