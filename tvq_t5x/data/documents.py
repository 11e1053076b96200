"""The documents of tasks: their texts, their tokens, and what a split of them holds."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import likelihood


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a split holds.

  Attributes:
    documents: texts or images.
    tokens: those that separate documents included.
    text_bytes: of text, or values of pixels.
    words: separated by white space; None where there is no text, or they were not counted.
  """

  documents: int = 0
  tokens: int = 0
  text_bytes: int = 0
  words: int | None = 0

  def word_metrics(self, cross_entropy: float) -> dict[str, float]:
    """The metric `word_perplexity`, or none where words were not counted.

    Args:
      cross_entropy: nats a token of the whole split.
    """
    if not self.words:
      return {}
    perplexity = likelihood.word_perplexity(cross_entropy, self.tokens, self.words)
    return {'word_perplexity': perplexity}

  def __add__(self, other: 'Counts') -> 'Counts':
    words = None if self.words is None or other.words is None else self.words + other.words
    return Counts(
      self.documents + other.documents,
      self.tokens + other.tokens,
      self.text_bytes + other.text_bytes,
      words,
    )


class Document(NamedTuple):
  """A text or an image.

  Attributes:
    tokens: [N], with the EOS that ends a text.
    text: in UTF-8; None for images.
  """

  tokens: np.ndarray
  text: bytes | None

  @property
  def counts(self) -> Counts:
    """What this document adds to a split."""
    if self.text is None:
      return Counts(1, len(self.tokens), len(self.tokens), None)
    words = len(self.text.decode(errors='replace').split())
    return Counts(1, len(self.tokens), len(self.text), words)


class Piece(NamedTuple):
  """Tokens of a document, of a part of one, or of several.

  Attributes:
    tokens: [N].
    counts: what they add to a split.
  """

  tokens: np.ndarray
  counts: Counts


def documents(task: seqio.Task, split: str) -> Iterator[Document]:
  """The documents of a split in order.

  Args:
    task: whose examples are whole documents where no length is given.
    split: of the task.

  Raises:
    ConfigError: if its source or its vocabulary can't be read.
  """
  # Said here, that it can't be loaded is one message; said while TensorFlow traces, it is many.
  _ = task.output_features['targets'].vocabulary.vocab_size
  dataset = task.get_dataset(None, split=split, shuffle=False, try_in_mem_cache=False)
  for example in examples(dataset):
    yield Document(example['targets'], example.get('targets_pretokenized'))


def texts(task: seqio.Task, split: str) -> Iterator[bytes] | None:
  """The texts of a split in order, in UTF-8, whether or not there is a vocabulary yet.

  Args:
    task: of any kind.
    split: of the task.

  Returns:
    Them; None if the task has no text.

  Raises:
    ConfigError: if its source can't be read.
  """
  features = {'targets': seqio.Feature(seqio.ByteVocabulary())}
  tokenized = task.replace(output_features=features).get_dataset(
    None, split=split, shuffle=False, try_in_mem_cache=False
  )
  sources = {
    'targets_pretokenized': tokenized,
    'targets': task.source.get_dataset(split, shuffle=False),
  }
  for name, dataset in sources.items():
    spec = dataset.element_spec.get(name)
    if spec is not None and spec.dtype == tf.string:
      return (example[name] for example in examples(dataset))
  return None


def examples(dataset: tf.data.Dataset) -> Iterator[Any]:
  """The examples of a dataset, their features as NumPy arrays.

  Raises:
    ConfigError: if its source does, in Python.
  """
  with refusals():
    yield from dataset.as_numpy_iterator()


@contextlib.contextmanager
def refusals() -> Iterator[None]:
  """Raises a ConfigError of Python code that TensorFlow calls as itself."""
  try:
    yield
  except tf.errors.OpError as e:
    if found := re.search(r'ConfigError: (.*)', str(e)):
      raise ConfigError(found[1]) from e
    raise
