"""Tasks that keep their tokens in a file, made when it is first read and then memory-mapped."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gin
import numpy as np
from absl import logging

from tvq_t5x.common import files
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import locations, vocabularies
from tvq_t5x.data.corpora import Corpus
from tvq_t5x.data.indexed import Counts, Document, IndexedSplit, IndexedTask

_MACRO = 'TOKEN_CACHE_DIR'
_SECONDS_BETWEEN_REPORTS = 30


@gin.configurable
def directory(path: str | None = None) -> str | None:
  """The folder of the token caches, macro TOKEN_CACHE_DIR.

  Args:
    path: of a local folder; None means the environment variable TOKEN_CACHE_DIR, or else
      `token_cache` in the folder of the data.
  """
  return locations.path(_MACRO, path)


class CachedTask(IndexedTask):
  """An `IndexedTask` whose tokens lie in a file for each split.

  The file is written when a split is first read: in one pass, whatever the size of the corpus. Its
  name follows from the corpus and the vocabulary, so that no other is ever taken for it. It is
  complete or not there; what an interruption leaves is overwritten by the next reader. Processes on
  one machine wait for the one that writes.
  """

  def __init__(self, *args: Any, corpus: Callable[[], Corpus], first_id: int = 0, **kwargs: Any):
    """Creates the task; reads nothing.

    Args:
      *args: as `IndexedTask`'s.
      corpus: returns where the documents lie.
      first_id: lowest id that a document has.
      **kwargs: as `IndexedTask`'s.
    """
    super().__init__(*args, **kwargs)
    self._corpus, self._first_id = corpus, first_id

  def read(self, split: str) -> IndexedSplit:
    """See the base class.

    Raises:
      ConfigError: if the corpus is not there or the file can't be written.
    """
    corpus, cache = self._place(split)
    found = cache.open()
    if found is None:
      with cache.locked():
        found = cache.open()  # Another process may have written it meanwhile.
        if found is None:
          cache.write(self.documents(split), corpus.num_documents(split))
          found = cache.open()
    assert found is not None
    return found

  def find(self, split: str) -> None:
    """See the base class."""
    self._place(split)

  def _place(self, split: str) -> tuple[Corpus, '_Cache']:
    corpus, vocabulary = self._corpus(), self.output_features['targets'].vocabulary
    identity = {
      **corpus.identity(split),
      'vocabulary': vocabularies.identity(vocabulary),
      'first_id': self._first_id,
      'dtype': str(np.min_scalar_type(vocabulary.vocab_size - 1 - self._first_id)),
    }
    folder = directory() or os.path.join(corpus.folder, 'token_cache')
    if '://' in folder:
      raise ConfigError(
        f'{_MACRO}: token caches are memory-mapped, which {folder} can not be; give a local folder '
        f'with {locations.how_to_set(_MACRO)}.'
      )
    return corpus, _Cache(pathlib.Path(folder), f'{self.name}-{split}', identity)


class _StoredTokens:
  """Tokens of a narrow type, from the lowest id on."""

  def __init__(self, array: np.ndarray, first_id: int):
    self._array, self._first_id = array, first_id

  def __len__(self) -> int:
    return len(self._array)

  def __getitem__(self, where: slice) -> np.ndarray:
    return self._array[where].astype(np.int32) + self._first_id


class _Cache:
  """A file of tokens, and one that says whose they are and how many."""

  def __init__(self, folder: pathlib.Path, name: str, identity: dict[str, Any]):
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    self._folder, self._name, self._identity = folder, name, identity
    self._tokens = folder / f'{name}-{key}.bin'
    self._record = folder / f'{name}-{key}.json'
    self._dtype = np.dtype(identity['dtype'])

  def open(self) -> IndexedSplit | None:
    """The tokens, or None if there is no complete file of them."""
    try:
      record = json.loads(self._record.read_text())
      size = self._tokens.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
      return None
    counts = Counts(**record['counts'])
    if record['identity'] != self._identity or size != counts.tokens * self._dtype.itemsize:
      logging.warning('%s is damaged, and is written anew.', self._tokens)
      return None
    # An empty file can not be mapped.
    array = np.memmap(self._tokens, self._dtype, 'r') if size else np.zeros([0], self._dtype)
    return IndexedSplit(_StoredTokens(array, self._identity['first_id']), counts)

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Creates the folder, and keeps other processes from writing the same file."""
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      lock = self._record.with_suffix('.lock').open('w')
    except OSError as e:
      raise ConfigError(
        f'{_MACRO}: the token cache of {self._name} can not be written: {e}. Give a folder of '
        f'yours with {locations.how_to_set(_MACRO)}.'
      ) from e
    with lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        logging.info('Waiting for another process that writes %s.', self._tokens)
        fcntl.flock(lock, fcntl.LOCK_EX)
      yield

  def write(self, documents: Iterable[Document], num_documents: int) -> None:
    """Writes the tokens of documents.

    Args:
      documents: in order.
      num_documents: how many, for the reports on the way.
    """
    logging.info('Writing the tokens of %s to %s, once.', self._name, self._tokens)
    first_id, largest = self._identity['first_id'], np.iinfo(self._dtype).max
    counts = Counts()
    start = reported = time.monotonic()
    with files.replacing(self._tokens) as f:
      for document in documents:
        values = document.tokens - first_id
        if len(values) and not 0 <= values.min() <= values.max() <= largest:
          raise ValueError(f'{self._name}: document {counts.documents} has ids out of range')
        f.write(values.astype(self._dtype).tobytes())
        counts += document.counts
        now = time.monotonic()
        if now - reported > _SECONDS_BETWEEN_REPORTS:
          reported = now
          logging.info(
            '%s: %s of %s documents, %s tokens, %d minutes left.',
            self._name, f'{counts.documents:,}', f'{num_documents:,}', f'{counts.tokens:,}',
            (now - start) / counts.documents * (num_documents - counts.documents) / 60,
          )  # fmt: skip
    record = {'identity': self._identity, 'counts': dataclasses.asdict(counts)}
    with files.replacing(self._record) as f:
      f.write(json.dumps(record, indent=2).encode())
