"""Classification tasks: a text, or two, or a sequence of real numbers, and its class."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import seqio
import tensorflow as tf

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.common.tokens import FIRST_BYTE
from tvq_t5x.data import indexed, registered, vocabularies

INPUTS, INPUTS2, LABEL = 'inputs', 'inputs2', 'label'


class Example(NamedTuple):
  """What is to be classified, and its class.

  Attributes:
    inputs: a text (`str`, or `bytes` in UTF-8), which the task's vocabulary tokenizes; or ids [n]
      of that vocabulary; or, for a task without one, real numbers [n].
    label: the class, from 0.
    inputs2: of a task with two texts, the second.
  """

  inputs: str | bytes | np.ndarray
  label: int
  inputs2: str | bytes | np.ndarray | None = None


class Examples(Protocol):
  """The examples of a split in order; one is read when it is asked for, by several threads.

  Those of one file may have its `path`, which is named where a split is refused.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int, /) -> Example: ...


class Format(NamedTuple):
  """What the examples of a task are, as far as a model has to know it.

  Attributes:
    vocabulary: of the texts; None for real numbers.
    num_classes: labels are below it.
    pair: whether an example has two texts.
  """

  vocabulary: seqio.Vocabulary | None
  num_classes: int
  pair: bool

  @property
  def identity(self) -> str:
    """What two formats share if the same numbers mean the same in them, or else not."""
    inputs = vocabularies.identity(self.vocabulary) if self.vocabulary else 'real numbers'
    return f'{"two times " if self.pair else ""}{inputs}, {self.num_classes} classes'


class ClassificationTask(indexed.TaskByIndex):
  """A task of examples that are read by their index, see `register`.

  Inputs of more than T tokens lose their tail, as the published protocols of such tasks have it;
  `num_cut` says how many do. Features are `inputs` (and `inputs2`), int32 ids or float32 numbers
  [at most T], and `label` [1] int32.
  """

  LENGTH_FEATURE = INPUTS

  def __init__(self, *args: Any, read: Callable[[str], Examples], **kwargs: Any):
    """Creates the task.

    Args:
      *args: as `indexed.TaskByIndex`'s.
      read: returns the examples of a split.
      **kwargs: as `indexed.TaskByIndex`'s.
    """
    super().__init__(*args, **kwargs)
    self._read = read

  def read(self, split: str) -> Examples:
    """The examples of a split, as they were registered.

    Raises:
      ConfigError: if they are not to be had, or have no length or items.
    """
    found: Any = self._read(split)
    if not (hasattr(found, '__len__') and hasattr(found, '__getitem__')) or isinstance(
      found, Mapping
    ):
      raise ConfigError(
        f'The examples of {self.name}, split {split!r}, are of type {type(found).__name__}: give a '
        'sequence, such as a list, with a length and items.'
      )
    return found

  def find(self, split: str) -> None:
    """See the base class; one example is read, and a split without any is refused."""
    found = self.read(split)
    if not len(found):
      path = getattr(found, 'path', None)
      where = '' if path is None else f': {str(path)!r} holds no examples'
      raise ConfigError(f'The split {split!r} of {self.name} is empty{where}.')
    _features(self, split, 0, found[0])

  def examples(self, split: str, length: int) -> tuple[int, Callable[[tf.Tensor], dict[str, Any]]]:
    """See the base class."""
    found, specs = self.read(split), _specs(self)

    def features(i: np.ndarray) -> list[np.ndarray]:
      index = int(i)
      return [x[:length] for x in _features(self, split, index, found[index]).values()]

    def example(i: tf.Tensor) -> dict[str, Any]:
      values = tf.numpy_function(features, [i], [x.dtype for x in specs.values()], stateful=False)
      return {
        name: tf.ensure_shape(x, spec.shape)
        for (name, spec), x in zip(specs.items(), values, strict=True)
      }

    return len(found), example

  def num_cut(self, split: str, length: int) -> int:
    """How many examples of a split have more than T tokens; all of them are read and checked.

    None are where all have T, which is checked when they are read.

    Raises:
      ConfigError: if they can't be read, or one is not what the task was registered for.
    """
    if self.sequence_len is not None:
      return 0
    found, names = self.read(split), [name for name in self.output_features if name != LABEL]
    total = 0
    for i in range(len(found)):
      values = _checked(self, split, i, found[i])
      total += any(_length(self, values[name]) > length for name in names)
    return total


def register(
  name: str,
  module: str,
  examples: Callable[[str], Examples],
  splits: Sequence[str],
  num_classes: int,
  vocabulary: seqio.Vocabulary | None = None,
  pair: bool = False,
  sequence_len: int | None = None,
) -> ClassificationTask:
  """Registers a classification task with SeqIO.

  Args:
    name: of the task.
    module: `__name__` of the module that calls this.
    examples: returns the examples of a split in order, such as a list. It is called whenever the
      task is read; it raises a ConfigError where they are not to be had.
    splits: names of the splits; a run trains on 'train' and validates on 'validation'.
    num_classes: labels are 0 to num_classes - 1; at least 2.
    vocabulary: of the texts; None for real numbers.
    pair: whether an example has two texts.
    sequence_len: the length of every input where it is the same, such as the pixels of an image,
      which are then never cut; None means any.

  Returns:
    the task, with the metrics `accuracy` and `cross_entropy`, exact in one pass.

  Raises:
    ConfigError: if `num_classes`, `vocabulary` or `sequence_len` is not accepted.
    ValueError: if another module, or this one, has registered a task of this name.
  """
  _check_settings(name, num_classes, vocabulary, sequence_len)
  inputs = (
    seqio.ContinuousFeature(dtype=tf.float32)
    if vocabulary is None
    else seqio.Feature(vocabulary, add_eos=False)
  )
  labels = seqio.Feature(seqio.PassThroughVocabulary(num_classes), add_eos=False)
  features = {INPUTS: inputs, **({INPUTS2: inputs} if pair else {}), LABEL: labels}
  source = functools.partial(_source, name)
  return indexed.register(  # pyright: ignore[reportReturnType]
    name,
    module,
    task_cls=ClassificationTask,
    source=seqio.FunctionDataSource(source, splits=splits),
    preprocessors=[],
    output_features=features,
    metric_objs=[ClassMetrics.empty()],
    read=examples,
    sequence_len=sequence_len,
  )


def _check_settings(name: str, num_classes: Any, vocabulary: Any, sequence_len: Any) -> None:
  def refuse(setting: str, value: Any, accepted: str) -> None:
    raise ConfigError(
      f'classification.register({name!r}): {setting} = {value!r} is not accepted: give {accepted}.'
    )

  if not _is_integer(num_classes) or num_classes < 2:
    refuse('num_classes', num_classes, 'a whole number of at least 2')
  if vocabulary is not None and not isinstance(vocabulary, seqio.Vocabulary):
    refuse('vocabulary', vocabulary, 'a seqio.Vocabulary, or None for real numbers')
  if sequence_len is not None and (not _is_integer(sequence_len) or sequence_len < 1):
    refuse('sequence_len', sequence_len, 'a whole number of at least 1, or None for any length')


def _is_integer(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_classification(provider: seqio.Task | seqio.Mixture) -> bool:
  """Whether the examples of a task or mixture have a class in the place of targets."""
  return all(LABEL in task.output_features for task in seqio.get_subtasks(provider))


def format_of(provider: seqio.Task | seqio.Mixture) -> Format:
  """What the examples of a task or mixture are.

  Args:
    provider: with the features of a `ClassificationTask`; any SeqIO task may have them.

  Raises:
    ConfigError: if they are others, or differ between the tasks of a mixture.
  """
  first, *others = (_format_of_task(task) for task in seqio.get_subtasks(provider))
  for other in others:
    if other != first:
      raise ConfigError(
        f'DatasetConfig.mixture_or_task_name = {provider.name!r}: its tasks have different inputs '
        f'or classes, {first.identity} and {other.identity}.'
      )
  return first


def _format_of_task(task: seqio.Task) -> Format:
  features = task.output_features
  if INPUTS not in features or LABEL not in features:
    raise ConfigError(
      f'DatasetConfig.mixture_or_task_name = {task.name!r} is no classification task: its output '
      f'features are {", ".join(features)}, and {INPUTS} and {LABEL} are needed.'
    )
  vocabulary = features[INPUTS].vocabulary
  if features[INPUTS].dtype.is_floating:
    vocabulary = None
  elif isinstance(vocabulary, vocabularies.SentencePieceVocabulary):
    vocabulary = vocabulary.bound()  # A model keeps it, whatever is configured later.
  return Format(vocabulary, features[LABEL].vocabulary.vocab_size, INPUTS2 in features)


def task_format(
  mixture_or_task_name: str | seqio.Task | seqio.Mixture, module: str | None = None
) -> Format:
  """`format_of` a task or mixture, by name.

  Args:
    mixture_or_task_name: as in `DatasetConfig`.
    module: as in `DatasetConfig`.

  Raises:
    ConfigError: likewise, and if no task has this name.
  """
  return format_of(registered.task_or_mixture(mixture_or_task_name, module))


def vocab_size(
  mixture_or_task_name: str | seqio.Task | seqio.Mixture, module: str | None = None
) -> int:
  """Ids of a classification task's vocabulary, made a multiple of 8; 8 for real numbers.

  Args:
    mixture_or_task_name: as in `DatasetConfig`.
    module: as in `DatasetConfig`.

  Raises:
    ConfigError: if it is no classification task.
  """
  vocabulary = task_format(mixture_or_task_name, module).vocabulary
  return 8 if vocabulary is None else -(-vocabulary.vocab_size // 8) * 8


def num_cut(provider: seqio.Task | seqio.Mixture, split: str, length: int) -> int | None:
  """How many examples of a split lose their tail; None where that is not known beforehand."""
  total = 0
  for task in seqio.get_subtasks(provider):
    if not isinstance(task, ClassificationTask):
      return None
    total += task.num_cut(split, length) if split in task.splits else 0
  return total


def class_metrics(
  targets: Sequence[Any], scores: tuple[Any, Mapping[str, Any]]
) -> dict[str, float]:
  """SeqIO's metrics of a split, for the `metric_fns` of a task: exact, each example counts once.

  Args:
    targets: classes of the examples.
    scores: of `ClassifierModel.score_batch`, the examples' values one after the other.

  Returns:
    `accuracy` and `cross_entropy`, nats an example.
  """
  log_likelihoods, aux = scores
  if len(targets) != len(log_likelihoods):
    raise ValueError(f'{len(log_likelihoods)} scores for {len(targets)} examples.')
  found = np.argmax(aux['log_probabilities'], axis=-1)
  return {
    'accuracy': float(np.mean(found == np.asarray(targets), dtype=np.float64)),
    'cross_entropy': float(-np.mean(log_likelihoods, dtype=np.float64)),
  }


class ClassMetrics(seqio.metrics.PassthroughLegacyMetric.from_metric_fn(class_metrics)):
  """A task's `metric_objs`: `class_metrics`, of the feature `label`."""

  def postprocess_targets(
    self,
    task_dataset_as_numpy: Iterable[Mapping[str, Any]],
    task_output_features: Mapping[str, seqio.Feature],
    target_field_name: str = 'targets',
  ) -> list[int]:
    """The classes of the examples."""
    del task_output_features, target_field_name
    return [int(np.reshape(example[LABEL], [])) for example in task_dataset_as_numpy]


def _source(name: str, split: str, shuffle_files: bool, seed: Any = None) -> tf.data.Dataset:
  """The examples of a split, whole."""
  del shuffle_files, seed  # A `TaskByIndex` shuffles examples.
  task: Any = seqio.TaskRegistry.get(name)
  found = task.read(split)
  return tf.data.Dataset.from_generator(
    lambda: (_features(task, split, i, found[i]) for i in range(len(found))),
    output_signature=_specs(task),
  )


def _specs(task: seqio.Task) -> dict[str, tf.TensorSpec]:
  return {
    name: tf.TensorSpec([1] if name == LABEL else [None], feature.dtype)
    for name, feature in task.output_features.items()
  }


def _features(
  task: ClassificationTask, split: str, index: int, example: Example
) -> dict[str, np.ndarray]:
  """The features of an example, not cut.

  Raises:
    ConfigError: if it is not what the task was registered for.
  """
  found = {}
  for name, value in _checked(task, split, index, example).items():
    is_text = isinstance(value, str | bytes)
    found[name] = _tokens(task.output_features[name].vocabulary, value) if is_text else value
    if name != LABEL and task.sequence_len not in (None, len(found[name])):
      raise ConfigError(
        f'{_place(task, split, index)}: {name} has the length {len(found[name])}, and the task '
        f'was registered with sequence_len = {task.sequence_len}.'
      )
  return found


def _checked(
  task: ClassificationTask, split: str, index: int, example: Any
) -> dict[str, str | bytes | np.ndarray]:
  """An example by features; texts are as they were given, before they are tokenized.

  Args:
    task: that it is of.
    split: likewise.
    index: of the example, for messages.
    example: what was read.

  Raises:
    ConfigError: if it is not what the task was registered for.
  """
  try:
    if not isinstance(example, Example):
      raise _Wrong(f'{_shown(example)} is no classification.Example')
    features = task.output_features
    found: dict[str, Any] = {INPUTS: _inputs(features[INPUTS], INPUTS, example.inputs)}
    if INPUTS2 in features:
      found[INPUTS2] = _inputs(features[INPUTS2], INPUTS2, example.inputs2)
    elif example.inputs2 is not None:
      raise _Wrong('it has inputs2, which tasks have that are registered with pair=True')
    found[LABEL] = _label(example.label, features[LABEL].vocabulary.vocab_size)
  except _Wrong as e:
    raise ConfigError(f'{_place(task, split, index)}: {e}.') from None
  return found


class _Wrong(Exception):
  """What is wrong with an example, in words."""


def _place(task: seqio.Task, split: str, index: int) -> str:
  return f'The task {task.name}, split {split!r}, example {index} (the first is 0)'


def _shown(value: Any) -> str:
  text = ' '.join(repr(value).split())
  return text if len(text) <= 60 else f'{text[:57]}...'


def _label(value: Any, num_classes: int) -> np.ndarray:
  """The feature [1] of a class, which may be a bool or an array of one integer."""
  found = np.asarray(None if isinstance(value, list | tuple) else value)
  if found.dtype.kind not in 'biu' or found.ndim:
    raise _Wrong(f'its label {_shown(value)} is no integer: classes are 0 to {num_classes - 1}')
  if not 0 <= found < num_classes:
    raise _Wrong(f'it is of class {found}: its classes are 0 to {num_classes - 1}')
  return found.astype(np.int32)[None]


def _inputs(feature: seqio.Feature, name: str, value: Any) -> str | bytes | np.ndarray:
  """A text as it is; or ids [n] int32, or real numbers [n] float32."""
  if value is None:
    raise _Wrong(f'it has no {name}')
  is_real, vocabulary = feature.dtype.is_floating, feature.vocabulary
  if isinstance(value, str | bytes):
    if is_real:
      raise _Wrong(
        f'{name} is the text {_shown(value)}: give a sequence of numbers, or the task a vocabulary'
      )
    if isinstance(vocabulary, seqio.PassThroughVocabulary):
      raise _Wrong(f'{name} is the text {_shown(value)}: give ids, as its vocabulary has no texts')
    return value
  try:
    found = np.asarray(value)
  except ValueError:  # Rows of different lengths.
    raise _Wrong(f'{name} is {_shown(value)}: give a sequence of numbers: flatten it') from None
  if found.ndim != 1:
    raise _Wrong(f'{name} has the shape {found.shape}: give a sequence of numbers: flatten it')
  if is_real:
    return _real(found, name)
  # An empty list has no integers.
  if found.dtype.kind not in 'iu' and len(found):
    raise _Wrong(f'{name} is of type {found.dtype}: give a text, or a sequence of integer ids')
  size = vocabulary.vocab_size
  if len(found) and not 0 <= found.min() <= found.max() < size:
    raise _Wrong(
      f'{name} has ids from {found.min()} to {found.max()}: those of its vocabulary are 0 to '
      f'{size - 1}'
    )
  return found.astype(np.int32, copy=False)


def _real(value: np.ndarray, name: str) -> np.ndarray:
  # The second is how NumPy has bfloat16.
  if value.dtype.kind not in 'biuf' and value.dtype.name != 'bfloat16':
    raise _Wrong(f'{name} is of type {value.dtype}: give a sequence of numbers')
  with np.errstate(over='ignore'):
    found = value.astype(np.float32, copy=False)
  if not np.isfinite(found).all():
    raise _Wrong(f'{name} has numbers that are not finite')
  return found


def _tokens(vocabulary: seqio.Vocabulary, text: str | bytes) -> np.ndarray:
  if type(vocabulary) is seqio.ByteVocabulary:
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.int32) + FIRST_BYTE
  text = text if isinstance(text, str) else text.decode(errors='replace')
  return np.asarray(vocabulary.encode(text), np.int32)


def _length(task: seqio.Task, value: Any) -> int:
  vocabulary = task.output_features[INPUTS].vocabulary
  if isinstance(value, str | bytes) and type(vocabulary) is not seqio.ByteVocabulary:
    return len(_tokens(vocabulary, value))
  return len(value.encode() if isinstance(value, str) else value)
