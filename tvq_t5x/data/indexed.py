"""SeqIO tasks whose sequences are read by index from the tokens of a split, laid end to end."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from tvq_t5x.common import errors, quiet
from tvq_t5x.common.tokens import EOS, FIRST_BYTE

with quiet.imports():  # A user's own task imports this first.
  import seqio
  import tensorflow as tf

  from tvq_t5x.data import split_metrics
  from tvq_t5x.data.documents import Counts, documents


class Tokens(Protocol):
  """The tokens of a split; a slice is read when it is asked for."""

  def __len__(self) -> int: ...

  def __getitem__(self, where: slice) -> np.ndarray:
    """The tokens in a slice of step 1, cut at the end as NumPy does it."""
    ...


class IndexedSplit(NamedTuple):
  """The tokens of a split and what they are."""

  tokens: Tokens
  counts: Counts


class TaskByIndex(seqio.Task):
  """A task that reads any of its examples by its index.

  Every epoch holds each example once, in an order of its own that follows from the seed and the
  epoch's number. Hosts take turns in that order, through all epochs: their k-th batches are
  together what one host would read as its k-th batch. The saved position of an iterator is a few
  kilobytes, however many batches are in flight.

  Attributes:
    sequence_len: the only T that is accepted, where all examples have it; None means any.
  """

  # The feature whose length is T.
  LENGTH_FEATURE: ClassVar[str]

  def __init__(self, *args: Any, sequence_len: int | None = None, **kwargs: Any):
    """Creates the task.

    Args:
      *args: as `seqio.Task`'s.
      sequence_len: see above.
      **kwargs: as `seqio.Task`'s.
    """
    super().__init__(*args, **kwargs)
    self.sequence_len = sequence_len

  def examples(self, split: str, length: int) -> tuple[int, Callable[[tf.Tensor], dict[str, Any]]]:
    """The examples of a split, cut to T.

    Args:
      split: of the task.
      length: T.

    Returns:
      Their number, and what makes the features of one from its index [] int64.

    Raises:
      ConfigError: if the data is not there; the message says where to get it.
    """
    raise NotImplementedError

  def find(self, split: str) -> None:
    """Looks for the data of a split, and prepares nothing.

    Raises:
      ConfigError: if it is not there; the message says where to get it.
    """
    raise NotImplementedError

  def survey(self, split: str) -> Counts | None:
    """What a split holds, found without writing anything.

    Returns:
      It, with 0 tokens where they are not known; None where it is not to be had.
    """
    del split
    return None

  def data_identity(self, split: str) -> str | None:
    """What tells the data of a split from other data, in words; None if the task's name does."""
    del split
    return None

  def check(self, split: str, lengths: Mapping[str, int]) -> None:
    """Refuses what `get_dataset` would refuse for sequences of these lengths."""
    self._check_length(lengths[self.LENGTH_FEATURE])
    self.find(split)

  def _check_length(self, length: int) -> None:
    if self.sequence_len not in (None, length):
      raise errors.ConfigError(
        'DatasetConfig.task_feature_lengths',
        {self.LENGTH_FEATURE: length},
        f'{{{self.LENGTH_FEATURE!r}: {self.sequence_len}}}',
        problem=f'is not the length of the sequences of {self.name}',
      )

  def get_dataset(
    self,
    sequence_length: Mapping[str, int] | None = None,
    split: str = 'train',
    use_cached: bool = False,
    shuffle: bool = True,
    shuffle_buffer_size: int | None = None,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    num_epochs: int | None = 1,
    trim_output_features: bool = True,
    try_in_mem_cache: bool = True,
  ) -> tf.data.Dataset:
    """See the base class.

    Without a length of `LENGTH_FEATURE`, that is all: examples stay whole. With it, `use_cached`,
    `shuffle_buffer_size`, `trim_output_features` and `try_in_mem_cache` have no effect.

    Raises:
      ConfigError: if the length is refused, or the data is not there.
    """
    length = (sequence_length or {}).get(self.LENGTH_FEATURE)
    if length is None:
      return super().get_dataset(
        sequence_length=sequence_length,
        split=split,
        use_cached=use_cached,
        shuffle=shuffle,
        shuffle_buffer_size=shuffle_buffer_size,
        seed=seed,
        shard_info=shard_info,
        num_epochs=num_epochs,
        trim_output_features=trim_output_features,
        try_in_mem_cache=try_in_mem_cache,
      )
    self._check_length(length)
    size, example = self.examples(split, length)
    if not size:
      raise errors.ConfigError(f'The split {split!r} of {self.name} is empty.')
    indices = _indices(size, shuffle, seed, num_epochs, shard_info or seqio.ShardInfo(0, 1))
    options = tf.data.Options()
    # A saved position says how far the reader has come, instead of holding all that is in flight.
    options.experimental_symbolic_checkpoint = True
    return indices.map(example, num_parallel_calls=tf.data.AUTOTUNE).with_options(options)


class IndexedTask(TaskByIndex):
  """A task that cuts sequences of T tokens from its documents, laid end to end.

  Sequence i holds the tokens i * T to (i + 1) * T; the last one may be short. No token is dropped,
  reordered or repeated: a document goes on in the next sequence, and the next document starts where
  it ends. The source and the preprocessors give whole documents; with a length, subclasses say
  where their tokens are kept. `sequence_len` is for sequences that are one document each.
  """

  LENGTH_FEATURE = 'targets'

  def __init__(self, *args: Any, **kwargs: Any):
    """Creates the task.

    Args:
      *args: as `TaskByIndex`'s.
      **kwargs: likewise. Without metrics, it has `split_metrics.Likelihood`.
    """
    if not kwargs.get('metric_fns') and not kwargs.get('metric_objs'):
      kwargs['metric_objs'] = [split_metrics.Likelihood.empty()]
    super().__init__(*args, **kwargs)

  def read(self, split: str) -> IndexedSplit:
    """The tokens of a split, without reading them.

    Raises:
      ConfigError: if the data is not there; the message says where to get it.
    """
    raise NotImplementedError

  def find(self, split: str) -> None:
    """See the base class."""
    self.read(split)

  def examples(self, split: str, length: int) -> tuple[int, Callable[[tf.Tensor], dict[str, Any]]]:
    """See the base class."""
    tokens, counts = self.read(split)
    of_split = split_metrics.features(counts.tokens, counts.words)

    def sequence(i: np.ndarray) -> np.ndarray:
      return np.asarray(tokens[i * length : (i + 1) * length], np.int32)

    def example(i: tf.Tensor) -> dict[str, Any]:
      targets = tf.numpy_function(sequence, [i], tf.int32, stateful=False)
      return {'targets': tf.ensure_shape(targets, [None]), **of_split}

    return -(-len(tokens) // length), example


def _indices(
  size: int, shuffle: bool, seed: int | None, num_epochs: int | None, shard: seqio.ShardInfo
) -> tf.data.Dataset:
  """One host's share of the indices below `size`, epoch after epoch."""
  if seed is None:
    seed = int(np.random.default_rng().integers(2**31))

  def epoch_order(epoch: tf.Tensor) -> tf.data.Dataset:
    order = tf.range(size, dtype=tf.int64)
    if shuffle:
      order = tf.random.experimental.stateless_shuffle(order, seed=tf.stack([seed, epoch]))  # pyright: ignore[reportAttributeAccessIssue]
    # Whose turn it is when the epoch begins depends on the ones before.
    first = tf.math.floormod(shard.index - epoch * size, shard.num_shards)
    return tf.data.Dataset.from_tensor_slices(order[first :: shard.num_shards])

  epochs = tf.data.Dataset.counter() if num_epochs is None else tf.data.Dataset.range(num_epochs)
  return epochs.flat_map(epoch_order)


class InMemoryTask(IndexedTask):
  """An `IndexedTask` that is small enough to be tokenized whenever it is read."""

  def find(self, split: str) -> None:
    """See the base class; one document is tokenized."""
    next(documents(self, split), None)

  def survey(self, split: str) -> Counts:
    """See the base class."""
    return self.read(split).counts

  def read(self, split: str) -> IndexedSplit:
    """See the base class; all tokens are read."""
    found = list(documents(self, split))
    tokens = np.concatenate([document.tokens for document in found] or [[]])
    return IndexedSplit(tokens, sum((document.counts for document in found), Counts()))


class ByteTokens:
  """Texts as the tokens of a `seqio.ByteVocabulary`, each followed by EOS."""

  def __init__(self, texts: Iterable[bytes | np.ndarray]):
    """Keeps the texts as they are: bytes, or uint8 arrays such as a memory-mapped file."""
    self._texts = [np.frombuffer(text, np.uint8) for text in texts]
    self._ends = np.cumsum([len(text) + 1 for text in self._texts], dtype=np.int64)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, where: slice) -> np.ndarray:
    start, stop, _ = where.indices(len(self))
    found = np.full(max(stop - start, 0), EOS, np.int32)
    # From the text that holds the first token to the one that holds the last.
    for i in range(np.searchsorted(self._ends, start, side='right'), len(self._texts)):
      text = self._texts[i]
      first = int(self._ends[i]) - 1 - len(text)
      if first >= stop:
        break
      part = text[max(start - first, 0) : max(stop - first, 0)].astype(np.int32) + FIRST_BYTE
      place = max(first - start, 0)
      found[place : place + len(part)] = part
    return found


class _ByteLevelTask(IndexedTask):
  """An `IndexedTask` that reads the bytes of its texts where they lie."""

  def __init__(self, *args: Any, texts: Callable[[str], Sequence[bytes | np.ndarray]], **kwargs):
    super().__init__(*args, **kwargs)
    self._texts = texts

  def read(self, split: str) -> IndexedSplit:
    texts = self._texts(split)
    tokens = ByteTokens(texts)
    return IndexedSplit(tokens, Counts(len(texts), len(tokens), len(tokens) - len(texts), None))

  def survey(self, split: str) -> Counts:
    return self.read(split).counts


def text_preprocessors() -> list[Callable[..., tf.data.Dataset]]:
  """What makes the documents of an `IndexedTask` from a source of {'targets': text}."""
  return [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]


def byte_level_task(
  name: str, texts: Callable[[str], Sequence[bytes | np.ndarray]], splits: Sequence[str]
) -> seqio.Task:
  """Registers a task that predicts texts byte by byte.

  Args:
    name: of the task.
    texts: returns the texts of a split in order, as bytes or as uint8 arrays, which may be
      memory-mapped. It is called when the task is read; it raises a ConfigError where they are not
      to be had. A function of the module that calls this.
    splits: names of the splits.

  Returns:
    the task, an `IndexedTask` with a `seqio.ByteVocabulary`, EOS after each text.
  """
  return register(
    name,
    texts.__module__,
    task_cls=_ByteLevelTask,
    source=text_source(texts, splits),
    preprocessors=text_preprocessors(),
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
    texts=texts,
  )


_registered: dict[str, tuple[str, Any]] = {}  # What `register` was called from, by task.


def register(
  name: str, module: str, task_cls: Callable[..., seqio.Task], **kwargs: Any
) -> seqio.Task:
  """Registers a task with SeqIO, anew when its module is reloaded.

  Args:
    name: of the task.
    module: `__name__` of the module that calls this.
    task_cls: makes the task, given its name and what follows.
    **kwargs: for `task_cls`.

  Raises:
    ValueError: if another module, or this one, has registered a task of this name.
  """
  # `importlib.reload` gives a module another one.
  spec = getattr(sys.modules.get(module), '__spec__', None)
  if name in _registered and _registered[name][0] == module and _registered[name][1] is not spec:
    seqio.TaskRegistry.remove(name)
  task = seqio.TaskRegistry.add(name, task_cls=task_cls, **kwargs)
  _registered[name] = module, spec
  return task


def text_source(
  texts: Callable[[str], Iterable[bytes | np.ndarray]], splits: Sequence[str]
) -> seqio.DataSource:
  """A source of {'targets': text}, from a function as in `byte_level_task`."""

  def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # An `IndexedTask` shuffles sequences, not texts.
    found = texts(split)
    return tf.data.Dataset.from_generator(
      lambda: ({'targets': bytes(text)} for text in found),
      output_signature={'targets': tf.TensorSpec([], tf.string)},
    )

  return seqio.FunctionDataSource(dataset, splits=splits)


def counts(provider: seqio.Task | seqio.Mixture, split: str) -> Counts | None:
  """What a split of a task holds; None for tasks of another kind and for mixtures."""
  return provider.read(split).counts if isinstance(provider, IndexedTask) else None
