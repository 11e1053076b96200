"""Batches of a SeqIO task or mixture, every token of it."""

import dataclasses
import functools
import json
import os
import pathlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from clu.data import dataset_iterator

from tvq_t5x.common import errors
from tvq_t5x.data import classification, vocabularies
from tvq_t5x.data.cutting import cut
from tvq_t5x.data.documents import Counts, refusals
from tvq_t5x.data.feature_converters import ClassificationFeatureConverter
from tvq_t5x.data.indexed import TaskByIndex
from tvq_t5x.data.registered import task_or_mixture

Batch = dict[str, np.ndarray]
FeatureConverterFactory = Callable[..., seqio.FeatureConverter]

# Files of a saved position: T5X's name for that of a single host, and the settings it belongs to.
POSITION = 'train_ds-000-of-001'
IDENTITY = 'config.json'


@dataclasses.dataclass
class DatasetConfig:
  """What to read and how to batch it; the fields are those of T5X's class of the same name.

  Attributes:
    mixture_or_task_name: a SeqIO task or mixture, or the name of a registered one.
    task_feature_lengths: tokens in a sequence, by task feature, such as {'targets': 512}, or for a
      classification task {'inputs': 512}.
    split: a split of the task.
    batch_size: sequences in a batch.
    shuffle: whether training shuffles; evaluation always reads in order.
    seed: of the shuffling: a whole number of 64 bits, or 0 to 2**31 - 2 where SeqIO shuffles.
    use_cached: whether to read what `seqio_cache_tasks` wrote.
    pack: given to the feature converter.
    module: a module to import first, which registers the task.
  """

  mixture_or_task_name: str | seqio.Task | seqio.Mixture
  task_feature_lengths: Mapping[str, int]
  split: str
  batch_size: int
  shuffle: bool
  seed: int | None
  use_cached: bool = False
  pack: bool = False
  module: str | None = None


class TrainingIterator(Iterator[Batch]):
  """Endless training batches whose position can be saved and restored, in the files of T5X."""

  def __init__(self, dataset: tf.data.Dataset, identity: Mapping[str, Any]):
    """Starts at the first batch.

    Args:
      dataset: batches.
      identity: the settings that a saved position depends on, as `datasets.identity` gives them.
    """
    self._iterator = dataset_iterator.TfDatasetIterator(dataset, checkpoint=True)
    stop_with(self, self._iterator.iterator, dataset)
    self._identity = dict(identity)

  def __next__(self) -> Batch:
    with refusals():
      return next(self._iterator)  # pyright: ignore[reportReturnType]

  def skip(self, num_batches: int) -> None:
    """Reads batches without giving them out."""
    for _ in range(num_batches):
      next(self)

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes the position: after `restore`, the next batch is the one that now comes next."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self._iterator.save(directory / POSITION)
    (directory / IDENTITY).write_text(identity_text(self._identity), encoding='utf-8')

  def restore(self, directory: str | os.PathLike[str]) -> None:
    """Continues from a saved position, which T5X may have saved.

    Raises:
      ConfigError: if nothing was saved there, or the position belongs to other settings.
    """
    directory = pathlib.Path(directory)
    position = directory / POSITION
    if not position.with_name(f'{position.name}.index').exists():
      raise errors.ConfigError(f'{directory} holds no saved position of a TrainingIterator.')
    path = directory / IDENTITY
    # Other programs do not say what settings the position is for.
    saved = json.loads(path.read_text(encoding='utf-8')) if path.exists() else self._identity
    if different := differences(saved, self._identity):
      raise errors.ConfigError(
        f'The position saved in {directory} is of other batches: {"; ".join(different)}. Give the '
        'settings there to continue, or start from an empty directory.'
      )
    self._iterator.restore(position)


class _Batches(Iterator[Batch]):
  """The elements of a dataset, on the host."""

  def __init__(self, dataset: tf.data.Dataset):
    self._iterator = iter(dataset)
    stop_with(self, self._iterator, dataset)

  def __next__(self) -> Batch:
    with refusals():
      return {name: x.numpy() for name, x in next(self._iterator).items()}


def stop_with(owner: Any, iterator: Any, dataset: tf.data.Dataset) -> None:
  """Ends the threads of an iterator when its owner is dropped, and before the process ends.

  They may run Python code, as those of a `TaskByIndex` do. TensorFlow by itself waits for them
  when Python has ended already, and so for ever.

  Args:
    owner: of the iterator; weakly referenced.
    iterator: from `iter(dataset)`.
    dataset: what it reads.
  """
  weakref.finalize(owner, _stop, iterator, dataset.take(0))


def _stop(iterator: Any, nothing: tf.data.Dataset) -> None:
  with tf.init_scope():
    tf.raw_ops.MakeIterator(
      dataset=tf.data.experimental.to_variant(nothing), iterator=iterator._iterator_resource
    )


def training_batches(
  cfg: DatasetConfig, feature_converter_cls: FeatureConverterFactory
) -> TrainingIterator:
  """Returns endless batches; `training_dataset` has their order.

  Args:
    cfg: what to read.
    feature_converter_cls: makes the feature converter, given `pack`.

  Raises:
    ConfigError: if a setting is refused; nothing is read before.
  """
  return TrainingIterator(training_dataset(cfg, feature_converter_cls), identity(cfg))


def training_dataset(
  cfg: DatasetConfig,
  feature_converter_cls: FeatureConverterFactory,
  shard_id: int = 0,
  num_shards: int = 1,
) -> tf.data.Dataset:
  """What `training_batches` iterates over, or one host's share of its rows.

  The epochs follow each other before batching: every batch is full, a batch may hold the end of one
  epoch and the start of the next, and no sequence is ever dropped. With a `TaskByIndex`, such as
  those of this package, each epoch holds every sequence once and has an order of its own. Other
  tasks shuffle with SeqIO's buffer, and the saved position then contains that buffer; their
  examples are cut into sequences, see `cutting.cut`.

  Args:
    cfg: what to read; T5X's class of this name has the same fields.
    feature_converter_cls: makes the feature converter, given `pack`.
    shard_id: which of the hosts' shares to return.
    num_shards: how many hosts there are; divides `cfg.batch_size`.

  Raises:
    ConfigError: if a setting is refused; nothing is read before.
  """
  provider = validate(cfg, feature_converter_cls)
  check_seed(cfg)
  shard = seqio.ShardInfo(shard_id, num_shards)
  dataset = _read(cfg, provider, feature_converter_cls, cfg.shuffle, None, shard)
  return dataset.batch(cfg.batch_size // num_shards, drop_remainder=True)


def check_seed(cfg: DatasetConfig) -> None:
  """Refuses training batches whose order nothing determines."""
  if cfg.shuffle and cfg.seed is None:
    raise errors.ConfigError(
      'DatasetConfig.seed',
      None,
      'a whole number, from which training batches can be reproduced and resumed, or '
      'DatasetConfig.shuffle = False',
      problem='is not accepted with DatasetConfig.shuffle = True',
    )


def check(cfg: DatasetConfig, feature_converter_cls: FeatureConverterFactory) -> None:
  """Validates what to read and looks for its data; no token cache is written.

  Raises:
    ConfigError: if a setting is refused, or the data is not there.
  """
  for task in _subtasks(cfg, validate(cfg, feature_converter_cls)):
    if isinstance(task, TaskByIndex):
      task.check(cfg.split, cfg.task_feature_lengths)
    else:
      _read(cfg, task, feature_converter_cls, shuffle=False, num_epochs=1)


def identity(cfg: DatasetConfig, carry_state: bool = False) -> dict[str, Any]:
  """The settings that the position in training batches depends on, as JSON has them."""
  provider = task_or_mixture(cfg.mixture_or_task_name, cfg.module)
  tasks = [task for task in _subtasks(cfg, provider) if isinstance(task, TaskByIndex)]
  data = {task.name: found for task in tasks if (found := task.data_identity(cfg.split))}
  return {
    'mixture_or_task_name': provider.name,
    'task_feature_lengths': dict(cfg.task_feature_lengths),
    'split': cfg.split,
    'batch_size': cfg.batch_size,
    'shuffle': cfg.shuffle,
    'seed': cfg.seed,
    'use_cached': cfg.use_cached,
    'carry_state': carry_state,
    'vocabulary': _format_identity(provider),
    **({'data': data} if data else {}),
  }


def _format_identity(provider: seqio.Task | seqio.Mixture) -> str:
  if classification.is_classification(provider):
    return classification.format_of(provider).identity
  return vocabularies.identity(vocabulary(provider))


def identity_text(identity: Mapping[str, Any]) -> str:
  """What `IDENTITY` beside a position holds."""
  return json.dumps(identity, indent=2, sort_keys=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """What differs between two results of `identity`, in words.

  Args:
    old: settings, perhaps of an earlier version, which did not say all.
    new: likewise.
  """

  def words(name: str) -> str:
    if name == 'vocabulary':
      return vocabularies.difference(old[name], new[name])
    if name == 'data':
      return f'the data is {_listed(new[name])}, there {_listed(old[name])}'
    owner = 'TransformerVQModel' if name == 'carry_state' else 'DatasetConfig'
    return f'{owner}.{name} = {new[name]!r}, there {old[name]!r}'

  return [words(name) for name in new if name in old and old[name] != new[name]]


def _listed(data: Mapping[str, str]) -> str:
  return ', '.join(f'{task}: {found}' for task, found in data.items())


def survey(cfg: DatasetConfig) -> Counts | None:
  """What the split of a setting holds, found without writing anything.

  Returns:
    Its counts, with 0 tokens where they are not known; None where they are not to be had.
  """
  tasks = _subtasks(cfg, task_or_mixture(cfg.mixture_or_task_name, cfg.module))
  found = [task.survey(cfg.split) if isinstance(task, TaskByIndex) else None for task in tasks]
  counts = [x for x in found if x is not None]
  return sum(counts, Counts()) if len(counts) == len(found) else None


def evaluation_batches(
  cfg: DatasetConfig, feature_converter_cls: FeatureConverterFactory
) -> Iterator[Batch]:
  """Returns one pass over the split in order, every token once, as batches of NumPy arrays [B, T].

  Rows of zeros, whose loss weights are zero too, fill the last batch up to the batch size: the
  tokens with a weight are the same for any batch size. The tasks of a mixture follow each other.
  `cfg.shuffle` has no effect.

  Args:
    cfg: what to read.
    feature_converter_cls: makes the feature converter, given `pack`.

  Raises:
    ConfigError: if a setting is refused; nothing is read before.
  """
  provider = validate(cfg, feature_converter_cls)
  return _Batches(evaluation_dataset(cfg, provider, feature_converter_cls))


def evaluation_dataset(
  cfg: DatasetConfig,
  provider: seqio.Task | seqio.Mixture,
  feature_converter_cls: FeatureConverterFactory,
) -> tf.data.Dataset:
  """Returns one pass over a split as a dataset of batches [B, T], every token once.

  Args:
    cfg: what to read, but for the task.
    provider: the task; of a mixture, its tasks follow each other.
    feature_converter_cls: makes the feature converter, given `pack`.
  """

  def fill_rows(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    def fill(x: tf.Tensor) -> tf.Tensor:
      rows = [[0, cfg.batch_size - tf.shape(x)[0]]] + [[0, 0]] * (x.shape.rank - 1)
      return tf.ensure_shape(tf.pad(x, rows), (cfg.batch_size, *x.shape[1:]))

    return {name: fill(x) for name, x in batch.items()}

  tasks = _subtasks(cfg, provider)
  parts = [_read(cfg, task, feature_converter_cls, shuffle=False, num_epochs=1) for task in tasks]
  dataset = functools.reduce(tf.data.Dataset.concatenate, parts)
  return dataset.batch(cfg.batch_size).map(fill_rows)


def vocabulary(
  mixture_or_task_name: str | seqio.Task | seqio.Mixture, module: str | None = None
) -> seqio.Vocabulary:
  """Returns the vocabulary of a task's or mixture's targets, as it is configured now.

  Args:
    mixture_or_task_name: as in `DatasetConfig`.
    module: as in `DatasetConfig`.

  Raises:
    ConfigError: if no task has this name, or the tasks of a mixture have different vocabularies.
  """
  provider = task_or_mixture(mixture_or_task_name, module)
  found, *others = (_vocabulary_of(task) for task in seqio.get_subtasks(provider))
  for other in others:
    if other != found:
      raise errors.ConfigError(
        f'DatasetConfig.mixture_or_task_name = {provider.name!r}: its tasks have different '
        f'vocabularies, {found} and {other}.'
      )
  return found


def _vocabulary_of(task: seqio.Task) -> seqio.Vocabulary:
  if 'targets' not in task.output_features:
    raise errors.ConfigError(
      f"DatasetConfig.mixture_or_task_name = {task.name!r} has no output feature 'targets'."
    )
  found = task.output_features['targets'].vocabulary
  # A model keeps it, whatever is configured later.
  return found.bound() if isinstance(found, vocabularies.SentencePieceVocabulary) else found


def vocab_size(
  mixture_or_task_name: str | seqio.Task | seqio.Mixture,
  module: str | None = None,
  multiple: int = 8,
) -> int:
  """Ids of the vocabulary of a task or mixture, rounded up so that meshes can share them out.

  Args:
    mixture_or_task_name: as in `DatasetConfig`.
    module: as in `DatasetConfig`.
    multiple: what the result is a multiple of.

  Raises:
    ConfigError: if no task has this name, or the vocabulary is not there.
  """
  size = vocabulary(mixture_or_task_name, module).vocab_size
  return -(-size // multiple) * multiple


def _subtasks(cfg: DatasetConfig, provider: seqio.Task | seqio.Mixture) -> list[seqio.Task]:
  return [task for task in seqio.get_subtasks(provider) if cfg.split in task.splits]


def _read(
  cfg: DatasetConfig,
  provider: seqio.Task | seqio.Mixture,
  feature_converter_cls: FeatureConverterFactory,
  shuffle: bool,
  num_epochs: int | None,
  shard: seqio.ShardInfo | None = None,
) -> tf.data.Dataset:
  converter, lengths = feature_converter_cls(pack=cfg.pack), cfg.task_feature_lengths
  if isinstance(converter, ClassificationFeatureConverter):
    lengths = converter.task_lengths(lengths)
  return seqio.get_dataset(
    cut(provider),
    task_feature_lengths=lengths,
    feature_converter=converter,
    dataset_split=cfg.split,
    use_cached=cfg.use_cached,
    shuffle=shuffle,
    num_epochs=num_epochs,
    shard_info=shard,
    seed=cfg.seed,
    verbose=False,
  )


def validate(
  cfg: DatasetConfig, feature_converter_cls: FeatureConverterFactory
) -> seqio.Task | seqio.Mixture:
  """Returns the task or mixture of a setting that can be read.

  Raises:
    ConfigError: naming the binding to change.
  """
  provider = task_or_mixture(cfg.mixture_or_task_name, cfg.module)
  if cfg.split not in provider.splits:
    splits = ', '.join(sorted(provider.splits))
    raise errors.ConfigError(
      'DatasetConfig.split', cfg.split, f'one of {splits}, the splits of {provider.name}'
    )
  lengths = cfg.task_feature_lengths
  converter = feature_converter_cls(pack=cfg.pack)
  needed = getattr(converter, 'LENGTHS_TO_GIVE', converter.TASK_FEATURES)
  if (
    not isinstance(lengths, Mapping)
    or set(lengths) != set(needed)
    or not all(map(errors.is_count, lengths.values()))
  ):
    example = {name: 512 for name in needed}
    raise errors.ConfigError(
      'DatasetConfig.task_feature_lengths',
      lengths,
      f'the features {", ".join(needed)} and no other, with a length of at least 1, such as '
      f'{example}',
    )
  if not errors.is_count(cfg.batch_size):
    raise errors.ConfigError(
      'DatasetConfig.batch_size', cfg.batch_size, 'a whole number of at least 1'
    )
  _check_seed_range(cfg.seed, provider)
  for task in _subtasks(cfg, provider) if cfg.use_cached else ():
    if task.supports_caching and not task.cache_dir:
      raise errors.ConfigError(
        'DatasetConfig.use_cached',
        True,
        'False, or name the directory that seqio_cache_tasks wrote with '
        'seqio.set_global_cache_dirs',
        problem=f'finds no cache of {task.name} in {list(seqio.get_global_cache_dirs())}',
      )
  return provider


# TensorFlow takes the seed of a buffer modulo the second of these.
_SEEDS = range(-(2**63), 2**63)
_SEEDS_OF_SEQIO = range(2**31 - 1)


def _check_seed_range(seed: Any, provider: seqio.Task | seqio.Mixture) -> None:
  """Refuses a seed that has the order of another one."""
  is_ours = all(isinstance(task, TaskByIndex) for task in seqio.get_subtasks(provider))
  accepted = _SEEDS if is_ours else _SEEDS_OF_SEQIO
  if seed is None or (isinstance(seed, int) and not isinstance(seed, bool) and seed in accepted):
    return
  where = '' if is_ours else f', as SeqIO shuffles {provider.name}'
  raise errors.ConfigError(
    'DatasetConfig.seed',
    seed,
    f'a whole number from {accepted[0]} to {accepted[-1]}{where}, or None',
  )
