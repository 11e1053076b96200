"""Corpora in the user's folders: what is read from them, and how to tell one from another."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

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

  def dataset(self, split: str, start: int = 0, stop: int | None = None) -> tf.data.Dataset:
    """The documents `start` to `stop` of a split in order, each {'targets': text or image}."""
    ...

  def num_documents(self, split: str) -> int:
    """How many documents a split has."""
    ...

  def identity(self, split: str) -> dict[str, str]:
    """What differs between two corpora if their documents do. Cheap: reads no document."""
    ...


@dataclasses.dataclass(frozen=True)
class TfdsCorpus:
  """A dataset that TFDS has prepared, in any format; it is never downloaded or changed.

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
    loader = seqio.utils.LazyTfdsLoader(self.name, self.data_dir)  # It knows T5X's flag.
    return loader.data_dir or tfds.core.constants.DATA_DIR  # pyright: ignore[reportAttributeAccessIssue]

  def dataset(self, split: str, start: int = 0, stop: int | None = None) -> tf.data.Dataset:
    """See `Corpus`."""
    examples = self.examples(split, start, stop)
    return examples.map(lambda example: {'targets': example[self.feature]})

  def examples(self, split: str, start: int = 0, stop: int | None = None) -> tf.data.Dataset:
    """The examples `start` to `stop` of a split in order, with all their features."""
    builder = self._builder()
    if self.feature not in builder.info.features:
      known = ', '.join(builder.info.features)
      raise ConfigError(f'{self.name} has no feature {self.feature!r}, but {known}.')
    instruction = tfds.core.ReadInstruction.from_spec(self.splits[split])
    (whole,) = instruction.to_absolute(builder.info.splits)
    everything = range(builder.info.splits[whole.splitname].num_examples)
    which = everything[whole.from_ : whole.to][start:stop]
    part = tfds.core.ReadInstruction(whole.splitname, from_=which.start, to=which.stop, unit='abs')
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
      # File after file: by default, TFDS reads several at a time.
      config = tfds.ReadConfig(interleave_cycle_length=1)
      return builder.as_dataset(split=part, shuffle_files=False, read_config=config)
    found = builder.as_data_source(split=part)
    features: Any = builder.info.features
    return tf.data.Dataset.from_generator(
      lambda: iter(found), output_signature=features.get_tensor_spec()
    )

  def available_splits(self) -> list[str]:
    """TFDS's splits that were prepared."""
    return list(self._builder().info.splits)

  def num_documents(self, split: str) -> int:
    """See `Corpus`."""
    return self._builder().info.splits[self.splits[split]].num_examples

  def identity(self, split: str) -> dict[str, str]:
    """See `Corpus`; TFDS's record of the dataset has the number and size of all shards."""
    self._check()
    with tf.io.gfile.GFile(self._record, 'rb') as f:
      record = hashlib.sha256(f.read()).hexdigest()
    return {'dataset': self.name, 'split': self.splits[split], 'record': record}

  def _builder(self) -> Any:  # A tfds.core.DatasetBuilder, whose methods hide their arguments.
    self._check()
    folder = os.path.dirname(self._record)
    # All that there is to know lies there; by its name, TFDS would look on the network, too.
    if tf.io.gfile.exists(os.path.join(folder, 'features.json')):
      return tfds.builder_from_directory(folder)
    return tfds.builder(self.name, data_dir=self.folder)  # As TFDS prepared it until 2021.

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
