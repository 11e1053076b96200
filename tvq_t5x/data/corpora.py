"""Corpora in the user's folders: what is read from them, and how to tell one from another."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import locations


class Corpus(Protocol):
  """Documents in files."""

  @property
  def folder(self) -> str:
    """Where the files lie."""
    ...

  def dataset(self, split: str) -> tf.data.Dataset:
    """The documents of a split in order, each {'targets': text or image}."""
    ...

  def num_documents(self, split: str) -> int:
    """How many documents a split has."""
    ...

  def identity(self, split: str) -> dict[str, str]:
    """What differs between two corpora if their documents do. Cheap: reads no document."""
    ...


@dataclasses.dataclass(frozen=True)
class TfdsCorpus:
  """A dataset that TFDS has prepared; it is never downloaded or changed.

  Attributes:
    name: with the configuration, if any, and the version.
    feature: of an example that is the document.
    splits: TFDS's splits or slices of splits, by the task's split.
    data_dir: TFDS's; None means T5X's --tfds_data_dir or else TFDS's default, ~/tensorflow_datasets
      or the environment variable TFDS_DATA_DIR.
    macro: that `data_dir` comes from, for messages.
  """

  name: str
  feature: str
  splits: Mapping[str, str]
  data_dir: str | None
  macro: str

  @property
  def folder(self) -> str:
    """TFDS's data directory."""
    return self._loader.data_dir or tfds.core.constants.DATA_DIR  # pyright: ignore[reportAttributeAccessIssue]

  def dataset(self, split: str) -> tf.data.Dataset:
    """See `Corpus`."""
    self._check()
    examples = self._source.get_dataset(split, shuffle=False)
    return examples.map(lambda example: {'targets': example[self.feature]})

  def num_documents(self, split: str) -> int:
    """See `Corpus`."""
    self._check()
    return self._loader.info.splits[self.splits[split]].num_examples

  def identity(self, split: str) -> dict[str, str]:
    """See `Corpus`; TFDS's record of the dataset has the number and size of all shards."""
    self._check()
    with tf.io.gfile.GFile(self._record, 'rb') as f:
      record = hashlib.sha256(f.read()).hexdigest()
    return {'dataset': self.name, 'split': self.splits[split], 'record': record}

  @property
  def _source(self) -> seqio.TfdsDataSource:
    return seqio.TfdsDataSource(self.name, self.data_dir, self.splits, read_only=True)

  @property
  def _loader(self) -> seqio.utils.LazyTfdsLoader:
    return self._source.tfds_dataset

  @property
  def _record(self) -> str:
    return os.path.join(self.folder, self.name.replace(':', '/'), 'dataset_info.json')

  def _check(self) -> None:
    # TFDS itself would look for the dataset on the network.
    if not tf.io.gfile.exists(self._record):
      raise ConfigError(
        f'TFDS has no dataset {self.name} in {self.folder}. Set its data directory with '
        f'{locations.how_to_set_data(self.macro)}, or prepare it there with '
        f"tfds.builder('{self.name}', data_dir={self.folder!r}).download_and_prepare()."
      )


def source(corpus: Callable[[], Corpus], splits: Sequence[str]) -> seqio.DataSource:
  """A SeqIO source of a corpus that is asked for when it is read.

  Args:
    corpus: returns it.
    splits: of the task.
  """

  def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # An `IndexedTask` shuffles sequences, not documents.
    return corpus().dataset(split)

  return seqio.FunctionDataSource(dataset, splits=splits)
