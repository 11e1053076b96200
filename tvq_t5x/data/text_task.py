"""The task of the user's own texts, whose tokens are made in constant memory."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import seqio
from absl import logging

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.common.tokens import EOS
from tvq_t5x.data import indexed, text_corpus, text_streams, token_cache, vocabularies
from tvq_t5x.data.documents import Counts, Piece
from tvq_t5x.data.text_corpus import Document, Oddities, TextCorpus

# Tokens of short documents that are passed on together.
_PIECE = 1 << 16
# What says where the files of a split are.
_SETTINGS = {
  'train': 'TEXT_FILES (or --data_dir)',
  'validation': 'TEXT_VALIDATION_FILES',
  'test': 'TEXT_TEST_FILES',
}


class TextTask(token_cache.CachedTask):
  """A `CachedTask` of a `TextCorpus`; files share its parts, and a file of any size is streamed.

  Its vocabulary is that of SENTENCEPIECE_MODEL, or bytes if that is not set.
  """

  def __init__(self, *args: Any, **kwargs: Any):
    """See the base class, whose `corpus` returns a `TextCorpus`."""
    super().__init__(*args, **kwargs)
    self._oddities = Oddities()
    self._of_pieces = {
      'targets': seqio.Feature(vocabularies.SentencePieceVocabulary(), add_eos=True)
    }

  @property
  def output_features(self) -> dict[str, seqio.Feature]:
    """Those of the vocabulary that is set now."""
    set_one = vocabularies.sentencepiece_model(required=False)
    return self._of_pieces if set_one else dict(super().output_features)

  def read(self, split: str) -> indexed.IndexedSplit:
    """See the base class. Tells what is odd in texts whose tokens it writes."""
    self._oddities = Oddities()
    found = super().read(split)
    _tell(split, self._oddities)
    return found

  def find(self, split: str) -> None:
    """See the base class; refuses a split without text, and reads up to its first document."""
    super().find(split)
    corpus = self._corpus()
    if not corpus.sources_of(split):
      raise ConfigError('TEXT_FILES: no file is left to train on, all are those of another split.')
    if any(any(document.blocks()) for document in corpus.read(split)):
      return
    if split in corpus.sources and (split != 'train' or not corpus.held_out):
      raise ConfigError(f'{_SETTINGS[split]}: the files of {split!r} have no text.')
    if not any(any(document.blocks()) for document in corpus.read('train')):
      raise ConfigError(f'{_SETTINGS["train"]}: the files have no text.')
    raise ConfigError(
      f'{split!r} has no text: there are too few documents to hold some out. Give TEXT_DOCUMENTS = '
      "'lines', or TEXT_HOLD_OUT = 'ends' for files, or a larger TEXT_HELD_OUT_SHARE than "
      f'{corpus.share}, or files of its own (TEXT_VALIDATION_FILES, TEXT_TEST_FILES).'
    )

  def survey(self, split: str) -> Counts | None:
    """See the base class; without a token cache, all texts are read. Tells what is odd in them."""
    if (found := super().survey(split)) is not None:
      return found
    counts, oddities = Counts(words=None), Oddities()
    logging.info('Reading the texts of %s to count them.', split)
    for document in self._corpus().read(split):
      size = sum(map(len, oddities.watched(document)))
      # Bytes are tokens; how many pieces there would be is not known.
      tokens = 0 if vocabularies.sentencepiece_model(required=False) else size + 1
      counts += Counts(1, tokens, size, None)
    _tell(split, oddities)
    return counts

  def blocks(self, split: str) -> Iterator[bytes]:
    """The text of a split in parts, with a line feed after each document."""
    documents = self._corpus().read(split)
    return itertools.chain.from_iterable(itertools.chain(x.blocks(), [b'\n']) for x in documents)

  def data_identity(self, split: str) -> str | None:
    """See the base class."""
    return self._corpus().description(split)

  def _shares(self, corpus: TextCorpus, split: str) -> tuple[int, int]:
    return len(corpus.sources_of(split)), 1

  def _documents(self, corpus: TextCorpus, split: str, which: range) -> Iterator[Piece]:
    vocabulary = self.output_features['targets'].vocabulary
    if isinstance(vocabulary, vocabularies.SentencePieceVocabulary):
      vocabulary = vocabulary.bound()
    waiting, counts = [], Counts(words=None)
    for document in corpus.read(split, which):
      for tokens, more in _pieces(document, vocabulary, self._oddities):
        waiting.append(tokens)
        counts += more
        if counts.tokens >= _PIECE:
          yield Piece(np.concatenate(waiting), counts)
          waiting, counts = [], Counts(words=None)
    if waiting:
      yield Piece(np.concatenate(waiting), counts)


def _pieces(
  document: Document, vocabulary: seqio.Vocabulary, oddities: Oddities
) -> Iterator[Piece]:
  """The tokens of a document in parts, EOS at the end."""
  size = 0

  def blocks() -> Iterator[bytes]:
    nonlocal size
    for block in oddities.watched(document):
      size += len(block)
      yield block

  told = 0
  for tokens in text_streams.encode_blocks(blocks(), vocabulary, document.shown):
    yield Piece(tokens, Counts(0, len(tokens), size - told, None))
    told = size
  yield Piece(np.array([EOS], np.int32), Counts(1, 1, size - told, None))


def _tell(split: str, oddities: Oddities) -> None:
  if text := str(oddities):
    logging.warning('Text of %s: %s.', split, text)


@functools.cache
def tell_once(message: str) -> None:
  """Writes a line to the log, if it is not there yet."""
  logging.info('%s', message)


def register(name: str, module: str, corpus: Callable[[], TextCorpus]) -> seqio.Task:
  """Registers a task of texts.

  Args:
    name: of the task.
    module: `__name__` of the module that calls this.
    corpus: returns where the texts are.
  """

  def dataset(split: str, shuffle_files: bool, seed: int | None = None):
    del shuffle_files, seed  # An `IndexedTask` shuffles sequences, not documents.
    return text_corpus.dataset(corpus().read(split))

  return indexed.register(
    name,
    module,
    source=seqio.FunctionDataSource(dataset, splits=text_corpus.SPLITS),
    preprocessors=indexed.text_preprocessors(),
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
    task_cls=TextTask,
    corpus=corpus,
    first_id=EOS,
  )
