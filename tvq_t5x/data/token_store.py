"""Tokens of a split in a TensorStore array, in a folder or bucket, written part by part."""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from absl import logging

from tvq_t5x.common.errors import ConfigError, reason
from tvq_t5x.data import locations
from tvq_t5x.data.documents import Counts, Document, Piece
from tvq_t5x.data.indexed import IndexedSplit

MACRO = 'TOKEN_CACHE_DIR'
_SECONDS_BETWEEN_REPORTS = 30
_MOST_PARTS = 64
_TOKENS_OF_FILE = 2**22
_MOST_TOKENS = 2**48  # Of a part.
_TOKENS_OF_READ = 2**13  # So many in a file are read at once.
# Where things lie in a file is read before them, and kept for later.
_CONTEXT = ts.Context({'cache_pool': {'total_bytes_limit': 100_000_000}})


class StoredTokens:
  """Tokens in the rows of an array, one after the other."""

  def __init__(self, array: ts.TensorStore, sizes: Sequence[int], ids: range, folder: str):
    """Reads nothing.

    Args:
      array: [rows, N] of unsigned integers.
      sizes: how many tokens each row has.
      ids: that tokens may have; the first is added to each number.
      folder: where they lie, for messages.
    """
    self._array, self._ids, self._folder = array, ids, folder
    self._ends = np.cumsum(sizes, dtype=np.int64)
    self._starts = self._ends - sizes

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, where: slice) -> np.ndarray:
    start, stop, _ = where.indices(len(self))
    stop = max(start, stop)
    first = np.searchsorted(self._ends, start, side='right')
    parts = []
    for row in range(first, np.searchsorted(self._starts, stop)):
      low, high = np.clip([start, stop], self._starts[row], self._ends[row]) - self._starts[row]
      parts.append(self._array[row, low:high].read())
    try:
      found = np.concatenate([part.result() for part in parts] or [[]])
    except ValueError as e:  # TensorStore's.
      raise ConfigError(f'{self._folder} is damaged: remove it. {reason(e)}') from e
    if len(found) and found.max() >= len(self._ids):
      raise ConfigError(f'{self._folder} is damaged: remove it. It has ids that stand for nothing.')
    return found.astype(np.int32) + self._ids.start


class TokenStore:
  """The tokens of a split, written by any number of processes that see the folder.

  Documents are shared out to parts by their number, whoever writes them. A process writes parts
  that no other has begun, and at last those that others have begun and not finished, as a killed
  one leaves them; two that write the same part write the same bytes. What is complete stays, so
  that an interruption costs a part.

  The folder has `identity.json`, the array `tokens/` (Zarr 3) with a row for each part, an empty
  `begun/I` for each part that was begun, and `parts/I.json` for each that is complete.

  Attributes:
    folder: of this store.
    num_parts: of the split; 0 without documents.
  """

  def __init__(
    self,
    folder: str,
    name: str,
    identity: Mapping[str, Any],
    ids: range,
    num_documents: int,
    least: int = 50,
  ):
    """Opens the folder; writes nothing.

    Args:
      folder: of this and other stores; local, or in a bucket as gs://bucket/folder.
      name: of the split, for its folder's name and for messages.
      identity: what differs from other stores, the 'dtype' of the tokens among it.
      ids: that tokens may have.
      num_documents: of the split, or of files of them: what parts share.
      least: documents in a part, where there are that many.

    Raises:
      ConfigError: if the folder can't be one.
    """
    self._identity = json.dumps(identity, indent=2, sort_keys=True)
    self._dtype, self._ids = np.dtype(identity['dtype']), ids
    key = hashlib.sha256(self._identity.encode()).hexdigest()[:12]
    self._name, self.folder = name, os.path.join(folder, f'{name}-{key}')
    self._num_documents = num_documents
    self.num_parts = min(_MOST_PARTS, -(-num_documents // least))
    self._begun: set[int] = set()
    self._start = self._reported = time.monotonic()
    self._documents_written = 0
    with self._refusals('read'):
      self._store = ts.KvStore.open(_location(self.folder), context=_CONTEXT).result()

  def complete_parts(self) -> dict[int, Counts]:
    """What the complete parts hold, by their numbers.

    Raises:
      ConfigError: if the folder can't be read.
    """
    with self._refusals('read'):
      keys = {key.decode() for key in self._store.list().result()}
      reads = {i: self._store.read(_record(i)) for i in self._parts() if _record(i) in keys}
      records = {i: read.result().value for i, read in reads.items()}
    counts = {i: self._counts(record) for i, record in records.items()}
    self._begun = {i for i in self._parts() if _mark(i) in keys}
    # A file that is lost would be read as zeros.
    return {
      i: found
      for i, found in counts.items()
      if all(file in keys for file in _files(i, found.tokens))
    }

  def begin(self, complete: Mapping[int, Counts]) -> tuple[int, range]:
    """Chooses a part to write, and tells other processes.

    Args:
      complete: from `complete_parts`, not all.

    Returns:
      Its number, and the numbers of its documents.

    Raises:
      ConfigError: if the folder can't be written.
    """
    if not complete and not self._documents_written:
      logging.info('Writing the tokens of %s to %s, once.', self._name, self.folder)
    missing = [i for i in self._parts() if i not in complete]
    part = random.SystemRandom().choice([i for i in missing if i not in self._begun] or missing)
    with self._refusals('written'):
      self._store.write('identity.json', self._identity).result()
      self._store.write(_mark(part), '').result()
    return part, self._documents_of(part)

  def write(self, part: int, documents: Iterable[Document | Piece]) -> None:
    """Writes the tokens of a part.

    Args:
      part: from `begin`.
      documents: of the part, in order.

    Raises:
      ConfigError: if the folder can't be written.
      ValueError: for other ids than a store may have.
    """
    array, counts = self._array(create=True), Counts()
    waiting, place = [np.zeros([0], self._dtype)], 0
    for document in documents:
      waiting.append(self._narrow(document, part, counts))
      counts += document.counts
      self._report(part, counts)
      if counts.tokens - place >= _TOKENS_OF_FILE:
        tokens = np.concatenate(waiting)
        size = len(tokens) // _TOKENS_OF_FILE * _TOKENS_OF_FILE
        self._write_tokens(array[part], place, tokens[:size])
        waiting, place = [tokens[size:]], place + size
    self._write_tokens(array[part], place, np.concatenate(waiting))
    with self._refusals('written'):
      self._store.write(_record(part), json.dumps(dataclasses.asdict(counts))).result()
    self._documents_written += counts.documents

  def open(self, complete: Mapping[int, Counts]) -> IndexedSplit:
    """The split.

    Args:
      complete: from `complete_parts`, all of them.
    """
    counts = [complete[i] for i in self._parts()]
    if not counts:
      return IndexedSplit(np.zeros([0], np.int32), Counts())
    array, sizes = self._array(create=False), [x.tokens for x in counts]
    tokens = StoredTokens(array, sizes, self._ids, self.folder)
    return IndexedSplit(tokens, sum(counts, Counts()))

  def _parts(self) -> range:
    return range(self.num_parts)

  def _documents_of(self, part: int) -> range:
    start, stop = (i * self._num_documents // self.num_parts for i in (part, part + 1))
    return range(start, stop)

  def _counts(self, record: bytes) -> Counts:
    """What the record of a part says."""
    try:
      values = json.loads(record)
      counts = Counts(**values)
      missing = {'documents', 'tokens', 'text_bytes'} - values.keys()
      numbers = [n for name, n in values.items() if (name, n) != ('words', None)]
      if missing or not all(type(n) is int and 0 <= n < _MOST_TOKENS for n in numbers):
        raise ValueError('wrong numbers in the record of a part')
    except (TypeError, ValueError, RecursionError) as e:
      raise ConfigError(f'{self.folder} is damaged: remove it. {reason(e)}') from e
    return counts

  def _array(self, create: bool) -> ts.TensorStore:
    """The array [parts, N]: rows have room for more than there is, and files for what there is."""
    codecs = [{'name': 'bytes', 'configuration': {'endian': 'little'}}, {'name': 'crc32c'}]
    inner = {'chunk_shape': [1, _TOKENS_OF_READ], 'codecs': codecs}
    outer = {'chunk_shape': [1, _TOKENS_OF_FILE]}
    metadata = {
      'shape': [self.num_parts, _MOST_TOKENS],
      'data_type': str(self._dtype),
      'chunk_grid': {'name': 'regular', 'configuration': outer},
      'codecs': [{'name': 'sharding_indexed', 'configuration': inner}],
    }
    kvstore = ts.KvStore.open(_location(f'{self.folder}/tokens'), context=_CONTEXT).result()
    with self._refusals('written' if create else 'read'):
      return ts.open(
        {
          'driver': 'zarr3',
          'kvstore': kvstore.spec().to_json(),
          'metadata': metadata,
          'store_data_equal_to_fill_value': True,  # Or black images would have no file.
        },
        context=_CONTEXT,
        open=True,
        create=create,
      ).result()

  def _narrow(self, document: Document | Piece, part: int, counts: Counts) -> np.ndarray:
    values = document.tokens - self._ids.start
    if len(values) and not 0 <= values.min() <= values.max() < len(self._ids):
      number = self._documents_of(part).start + counts.documents
      raise ValueError(f'{self._name}: document {number} has ids out of range')
    return values.astype(self._dtype)

  def _write_tokens(self, row: ts.TensorStore, place: int, tokens: np.ndarray) -> None:
    with self._refusals('written'):
      row[place : place + len(tokens)].write(tokens).result()

  def _report(self, part: int, counts: Counts) -> None:
    now = time.monotonic()
    if now - self._reported > _SECONDS_BETWEEN_REPORTS:
      self._reported = now
      logging.info(
        '%s: part %d of %d, %s documents, %s tokens; %.1f documents a second.',
        self._name, part + 1, self.num_parts, f'{counts.documents:,}', f'{counts.tokens:,}',
        (self._documents_written + counts.documents) / (now - self._start),
      )  # fmt: skip

  @contextlib.contextmanager
  def _refusals(self, what: str) -> Iterator[None]:
    try:
      yield
    except ValueError as e:  # TensorStore's, for all that fails.
      raise ConfigError(
        f'{MACRO}: the token cache of {self._name} can not be {what} in {self.folder}: '
        f'{reason(e)} Give a folder of yours, local or in a bucket (gs:// or s3://), with '
        f'{locations.how_to_set(MACRO)}.'
      ) from e


def _location(folder: str) -> str | dict[str, str]:
  """A folder as TensorStore takes it."""
  if '://' in folder:
    scheme, _, rest = folder.partition('://')
    return f'{scheme}://{urllib.parse.quote(rest)}/'
  return {'driver': 'file', 'path': os.path.abspath(folder) + '/'}


def _record(part: int) -> str:
  return f'parts/{part}.json'


def _mark(part: int) -> str:
  return f'begun/{part}'


def _files(part: int, tokens: int) -> Iterator[str]:
  """The files that hold so many tokens of a part."""
  return (f'tokens/c/{part}/{i}' for i in range(-(-tokens // _TOKENS_OF_FILE)))
