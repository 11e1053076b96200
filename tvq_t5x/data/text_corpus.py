"""The user's own texts: which documents there are, and which of them train, validate and test."""

import codecs
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import documents as task_documents
from tvq_t5x.data import text_files
from tvq_t5x.data.corpora import TfdsCorpus
from tvq_t5x.data.text_files import TextFile

SPLITS = ('train', 'validation', 'test')
# Fewer whole files than that are too few to share out by chance: the end of each is held out.
FEW = 200
_BOM = b'\xef\xbb\xbf'
# What processes share of a dataset of TFDS: at most so many parts, of at least so many documents.
_TFDS_PARTS, _TFDS_DOCUMENTS = 64, 50


class TfdsPart(NamedTuple):
  """Some of the documents of a dataset of TFDS.

  Attributes:
    corpus: the dataset.
    split: that the task calls so.
    start: number of the first document.
    stop: number after the last one.
  """

  corpus: TfdsCorpus
  split: str
  start: int
  stop: int


Source = TextFile | TfdsPart


class Document(NamedTuple):
  """A document, or a stretch of one.

  Attributes:
    text: all of it; None for a file, which is read when it is asked for.
    source: where it comes from.
    start: bytes of the file before it.
    stop: of the stretch; None means that of the file.
  """

  text: bytes | None
  source: Source
  start: int = 0
  stop: int | None = None

  def blocks(self) -> Iterator[bytes]:
    """The text in parts, none of which is empty."""
    if self.text is not None:
      yield from filter(None, [self.text])
      return
    assert isinstance(self.source, TextFile)
    left = None if self.stop is None else self.stop - self.start
    for block in text_files.blocks(self.source, self.start):
      yield block[:left]
      if left is not None and (left := left - len(block)) <= 0:
        return

  @property
  def shown(self) -> str:
    """Where it comes from, for messages."""
    return self.source.path if isinstance(self.source, TextFile) else self.source.corpus.name


@dataclasses.dataclass
class Oddities:
  """What is unusual in documents; they are read as they are.

  Attributes:
    documents: that were looked at.
    found: how many of them are so, and where the first of them is.
  """

  documents: int = 0
  found: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

  def watched(self, document: Document) -> Iterator[bytes]:
    """The blocks of a document, which is looked at meanwhile."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    is_text, has_crlf, before = True, False, None
    for block in document.blocks():
      if before is None and block.startswith(_BOM):
        self._add('begin with a byte order mark', document)
      has_crlf = has_crlf or b'\r\n' in block or (before == b'\r' and block.startswith(b'\n'))
      is_text = is_text and _decodes(decoder, block)
      before = block[-1:]
      yield block
    self.documents += 1
    if before is None:
      self._add('are empty', document)
    if has_crlf or before == b'\r':  # A line is a document without its line feed.
      self._add('have line ends of carriage return and line feed', document)
    if not (is_text and _decodes(decoder, b'', final=True)):
      self._add('have bytes that are no UTF-8', document)

  def _add(self, what: str, document: Document) -> None:
    number, first = self.found.get(what, (0, document.shown))
    self.found[what] = number + 1, first

  def __str__(self) -> str:
    """In words; '' for nothing."""
    if not self.found:
      return ''
    parts = [
      f'{n:,} {what} (the first in {path})' for what, (n, path) in sorted(self.found.items())
    ]
    return f'of {self.documents:,} documents {", ".join(parts)}: they are read as they are'


def _decodes(decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> bool:
  try:
    decoder.decode(block, final)
  except UnicodeDecodeError:
    return False
  return True


@dataclasses.dataclass(frozen=True)
class TextCorpus:
  """Documents in files, or in a dataset of TFDS.

  Attributes:
    folder: where they lie.
    sources: of each split that has its own; the others are held out of 'train'.
    documents: 'files', 'lines' or 'records'; None means records where there are, or else files.
    field: of a record that is its text.
    hold_out: 'documents' or 'ends'; None means ends of few files, or else documents.
    share: of the text that is held out for each split that has no files of its own.
  """

  folder: str
  sources: Mapping[str, Sequence[Source]]
  documents: str | None = None
  field: str = 'text'
  hold_out: str | None = None
  share: float = 0.05

  def __post_init__(self):
    for name, value, accepted in (
      ('TEXT_DOCUMENTS', self.documents, ('files', 'lines', 'records', None)),
      ('TEXT_HOLD_OUT', self.hold_out, ('documents', 'ends', None)),
    ):
      if value not in accepted:
        raise ConfigError(f'{name} = {value!r} is not accepted: give {_one_of(accepted)}.')
    if not isinstance(self.share, float) or not 0 < self.share <= 0.25:
      raise ConfigError(
        f'TEXT_HELD_OUT_SHARE = {self.share!r} is not accepted: give a number above 0 and up to '
        '0.25.'
      )
    for source in (source for found in self.sources.values() for source in found):
      has_records = not isinstance(source, TextFile) or source.has_records
      if self.documents is not None and (self.documents == 'records') != has_records:
        path = source.path if isinstance(source, TextFile) else source.corpus.name
        kind = 'a table of records' if has_records else 'no table of records, but text'
        other = ('records',) if has_records else ('files', 'lines')
        raise ConfigError(
          f'TEXT_DOCUMENTS = {self.documents!r}: {path} is {kind}; give {_one_of((*other, None))}.'
        )
    if self.hold_out == 'ends' and not self._are_files:
      raise ConfigError(
        "TEXT_HOLD_OUT = 'ends' is of text files that are a document each: give None."
      )

  @property
  def held_out(self) -> tuple[str, ...]:
    """The splits that have no sources of their own."""
    return tuple(split for split in SPLITS[1:] if split not in self.sources)

  @property
  def holds_out_ends(self) -> bool:
    """Whether it is the end of each file that is held out, in place of whole documents."""
    if self.hold_out is None:
      return self._are_files and len(self.sources['train']) < FEW
    return self.hold_out == 'ends'

  @property
  def _are_files(self) -> bool:
    files = all(isinstance(x, TextFile) and not x.has_records for x in self.sources['train'])
    return files and self.documents != 'lines'

  def sources_of(self, split: str) -> Sequence[Source]:
    """What has to be read for a split."""
    return self.sources.get(split, self.sources['train'])

  def read(self, split: str, which: range | None = None) -> Iterator[Document]:
    """The documents of a split in order.

    Args:
      split: one of `SPLITS`.
      which: numbers of the sources of the split to read; None means all.

    Raises:
      ConfigError: for a file that can't be read, or has no such field.
    """
    sources = self.sources_of(split)
    held_out = self.held_out if split == 'train' or split not in self.sources else ()
    for source in sources if which is None else sources[which.start : which.stop]:
      if held_out and self.holds_out_ends:
        assert isinstance(source, TextFile)
        yield from _stretch(source, split, held_out, self.share)
        continue
      for document in self._documents(source):
        if not held_out or _split_of(document, held_out, self.share) == split:
          yield document

  def _documents(self, source: Source) -> Iterator[Document]:
    if isinstance(source, TfdsPart):
      dataset = source.corpus.dataset(source.split, source.start, source.stop)
      texts: Iterable[bytes] = (x['targets'] for x in task_documents.examples(dataset))
    elif source.has_records:
      texts = text_files.records(source, self.field)
    elif self.documents == 'lines':
      texts = text_files.lines(source)
    else:
      yield Document(None, source)
      return
    for text in texts:
      yield Document(text, source)

  def identity(self, split: str) -> dict[str, str]:
    """What differs between two corpora if their documents do. Cheap: reads no document."""
    return {'text': self._digest(split, with_times=True), 'split': split, **self._rules(split)}

  def description(self, split: str) -> str:
    """The same in words, for the record of a run: it may go on where the files were copied."""
    sources = self.sources_of(split)
    size = sum(os.path.getsize(x.path) for x in sources if isinstance(x, TextFile))
    digest = hashlib.sha256((self._digest(split) + str(self._rules(split))).encode()).hexdigest()
    what = f'{size:,} bytes in {len(sources):,} files' if size else 'a dataset of TFDS'
    return f'{what} (sha256 of names, sizes and rules {digest[:12]})'

  def _rules(self, split: str) -> dict[str, str]:
    rules = {'documents': str(self.documents), 'field': self.field}
    if split in self.sources and (split != 'train' or not self.held_out):
      return rules
    how = 'ends' if self.holds_out_ends else 'documents'
    return {**rules, 'held_out': f'{self.share} for each of {", ".join(self.held_out)}, {how}'}

  def _digest(self, split: str, with_times: bool = False) -> str:
    digest = hashlib.sha256()
    for source in self.sources_of(split):
      if isinstance(source, TfdsPart):
        digest.update(str(source.corpus.identity(source.split)).encode())
        break  # The others are parts of the same.
      status = os.stat(source.path)
      name = os.path.relpath(source.path, self.folder)
      time = status.st_mtime_ns if with_times else ''
      digest.update(f'{name} {status.st_size} {time}\n'.encode(errors='surrogateescape'))
    return digest.hexdigest()


def of_tfds(corpus: TfdsCorpus) -> dict[str, list[TfdsPart]]:
  """The sources of a dataset of TFDS, those of each of its splits that a task has."""
  found = {}
  for split in corpus.splits:
    number = corpus.num_documents(split)
    size = max(_TFDS_DOCUMENTS, -(-number // _TFDS_PARTS))
    starts = range(0, number, size)
    found[split] = [TfdsPart(corpus, split, i, min(i + size, number)) for i in starts]
  return found


def dataset(documents: Iterable[Document]) -> tf.data.Dataset:
  """Whole documents as SeqIO takes them, {'targets': text}."""
  return tf.data.Dataset.from_generator(
    lambda: ({'targets': b''.join(document.blocks())} for document in documents),
    output_signature={'targets': tf.TensorSpec([], tf.string)},
  )


def _one_of(values: Sequence[str | None]) -> str:
  return ' or '.join(map(repr, values))


def _split_of(document: Document, held_out: Sequence[str], share: float) -> str:
  """The split of a document, which follows from its text alone: the same text has the same."""
  digest = hashlib.blake2b(digest_size=8)
  for block in document.blocks():
    digest.update(block)
  place = int.from_bytes(digest.digest(), 'big') / 2**64
  number = int(place / share)
  return held_out[number] if number < len(held_out) else 'train'


def _stretch(
  file: TextFile, split: str, held_out: Sequence[str], share: float
) -> Iterator[Document]:
  """The part of a file that a split has: the end is that of the last split that is held out."""
  status = os.stat(file.path)
  shares = tuple(1 - share * (len(held_out) - i) for i in range(len(held_out)))
  cuts = _cuts(file, shares, status.st_size, status.st_mtime_ns)
  number = ('train', *held_out).index(split)
  start, stop = cuts[number], cuts[number + 1]
  if start < stop or (split == 'train' and not cuts[-1]):  # An empty file trains.
    yield Document(None, file, start, stop)


@functools.lru_cache(maxsize=FEW)
def _cuts(file: TextFile, shares: Sequence[float], size: int, mtime_ns: int) -> tuple[int, ...]:
  """Where stretches start and end: near these shares of the bytes, between two characters."""
  del size, mtime_ns  # Another file at the same path is another entry of the cache.
  size = text_files.size(file)
  cuts = [0]
  for share in shares:
    wanted = int(size * share)
    after = b''.join(Document(None, file, wanted, wanted + 4).blocks())
    starts = [i for i, x in enumerate(after) if x & 0xC0 != 0x80]  # Of characters.
    cuts.append(min(size, wanted + (starts[0] if starts else len(after) % 4)))
  return *cuts, size
