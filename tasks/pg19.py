"""`pg19`: the books of Project Gutenberg from before 1919, in SentencePiece's pieces.

Read as TFDS prepared them (`pg19:0.1.1`), or as they are published at gs://deepmind-gutenberg:
`metadata.csv` and `{train,validation,test}/<id>.txt`. 28,602, 50 and 100 books; EOS follows each.

The vocabulary is the user's, with 32,000 pieces in the paper:

    python -m tvq_t5x.train_vocab --task=pg19 --data_dir=FOLDER --output=pg19

Results are told as perplexity of words: exp(nats of all tokens / words of the split), with the
published numbers of words.
"""

import csv
import dataclasses
import hashlib
import os

import seqio
import tensorflow as tf

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import corpora, indexed, locations, token_cache, vocabularies
from tvq_t5x.gin_support.configurables import configurable

_MACRO = 'PG19_PATH'
_TFDS = 'pg19:0.1.1'
# Books and words, as published.
_PUBLISHED = {
  'train': (28_602, 1_973_136_207),
  'validation': (50, 3_007_061),
  'test': (100, 6_966_499),
}


@configurable
def corpus(path: str | None = None) -> corpora.Corpus:
  """Where the books lie.

  Args:
    path: of the folder with `metadata.csv`, or of TFDS's data directory; macro PG19_PATH. None
      means the environment variable PG19_PATH, or else the folder of --data_dir, or else TFDS's
      default.
  """
  found = locations.data_path(_MACRO, path)
  if found and os.path.exists(os.path.join(found, 'metadata.csv')):
    return PublishedBooks(found)
  return corpora.TfdsCorpus(
    _TFDS, 'book_text', {split: split for split in _PUBLISHED}, found, _MACRO
  )


@dataclasses.dataclass(frozen=True)
class PublishedBooks:
  """PG-19 in files as published.

  Attributes:
    folder: with `metadata.csv`, whose first column is the books' ids, and a folder for each split.
  """

  folder: str

  def dataset(self, split: str, start: int = 0, stop: int | None = None) -> tf.data.Dataset:
    """See `corpora.Corpus`; the order is that of `metadata.csv`."""
    files = self._files(split)[start:stop]
    return tf.data.Dataset.from_generator(
      lambda: ({'targets': _text(path)} for path in files),
      output_signature={'targets': tf.TensorSpec([], tf.string)},
    )

  def num_documents(self, split: str) -> int:
    """See `corpora.Corpus`."""
    return len(self._files(split))

  def identity(self, split: str) -> dict[str, str]:
    """See `corpora.Corpus`: names, sizes and times of the files."""
    digest = hashlib.sha256()
    for path in self._files(split):
      status = os.stat(path)
      digest.update(f'{os.path.basename(path)} {status.st_size} {status.st_mtime_ns}\n'.encode())
    return {'dataset': 'PG-19 as published', 'split': split, 'files': digest.hexdigest()}

  @property
  def _shown(self) -> str:
    return f'{self.folder!r} ({_MACRO} or --data_dir)'

  def _files(self, split: str) -> list[str]:
    """Paths of a split's books in the order of `metadata.csv`."""
    names = [f'{i}.txt' for i in _ids(os.path.join(self.folder, 'metadata.csv'))]
    folders = {s: os.path.join(self.folder, s) for s in _PUBLISHED}
    there = {s: _books(path) for s, path in folders.items() if os.path.isdir(path)}
    if split not in there:
      raise ConfigError(f'{self._shown} has metadata.csv, but no folder {split!r}.')
    unknown = sorted(there[split] - set(names))
    # With all folders there, nothing may be missing: the download was perhaps interrupted.
    missing = [name for name in names if not any(name in files for files in there.values())]
    if unknown or (missing and len(there) == len(folders)):
      raise ConfigError(
        f'{self._shown} is not PG-19 as published: '
        + '; '.join(
          f'{len(found):,} {what}, such as {found[0]}'
          for found, what in (
            (unknown, f'files in {split}/ are not in metadata.csv'),
            (missing, 'books of metadata.csv have no file'),
          )
          if found
        )
        + '.'
      )
    return [os.path.join(folders[split], name) for name in names if name in there[split]]


def _books(folder: str) -> set[str]:
  """The files that can be books: not what file managers and downloads leave beside them."""
  return {name for name in os.listdir(folder) if name.endswith('.txt') and name[0] != '.'}


def _ids(path: str) -> list[str]:
  """The first column of `metadata.csv`."""
  # Editors may have put a byte order mark before it; no id begins with one.
  lines = _read(path).removeprefix('\ufeff').splitlines(keepends=True)
  return [row[0] for row in csv.reader(lines) if row]


def _text(path: str) -> bytes:
  return _read(path).strip().encode()  # What TFDS does, so that both give the same tokens.


def _read(path: str) -> str:
  with open(path, encoding='utf-8', newline='') as f:
    try:
      return f.read()
    except UnicodeDecodeError as e:
      raise ConfigError(f'{path} is damaged: it is no text in UTF-8 ({e}); get it again.') from e


class _WordsAsPublished(token_cache.CachedTask):
  """Its counts of words are the published ones if the corpus is the real one."""

  def read(self, split: str) -> indexed.IndexedSplit:
    tokens, counts = super().read(split)
    books, words = _PUBLISHED[split]
    # A count of words depends a little on what is taken for white space.
    if counts.documents == books and counts.words and abs(counts.words / words - 1) < 0.01:
      counts = dataclasses.replace(counts, words=words)
    return indexed.IndexedSplit(tokens, counts)


indexed.register(
  'pg19',
  __name__,
  source=corpora.source(corpus, tuple(_PUBLISHED)),
  preprocessors=indexed.text_preprocessors(),
  output_features={'targets': seqio.Feature(vocabularies.SentencePieceVocabulary(), add_eos=True)},
  task_cls=_WordsAsPublished,
  corpus=corpus,
)
