"""Data for T5X: every token of a task, at a position that is that of a step of a run."""

from typing import Any

import jax
import seqio
import tensorflow as tf
from absl import logging
from clu.data import dataset_iterator
from etils import epath
from t5x import utils

from tvq_t5x.checkpoints import layout
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import cutting, datasets, registered, streaming, vocabularies
from tvq_t5x.data.datasets import FeatureConverterFactory
from tvq_t5x.gin_support import origins
from tvq_t5x.training.base_model import Model


def get_dataset(
  cfg: utils.DatasetConfig,
  shard_id: int,
  num_shards: int,
  feature_converter_cls: FeatureConverterFactory,
  *,
  model_dir: str,
  update_len: int | None = None,
  carry_state: bool = False,
) -> 'TrainingIterator':
  """T5X's `get_dataset_fn` for training.

  Args:
    cfg: what to read.
    shard_id: which of the hosts' shares to return.
    num_shards: how many there are.
    feature_converter_cls: makes the feature converter, given `pack`.
    model_dir: folder of the run.
    update_len: tokens of each sequence that an update sees; None means all.
    carry_state: whether rows go on in the next batch, for a model with this setting.

  Raises:
    ConfigError: if the run's newest checkpoint is of other data or of another vocabulary.
  """
  if carry_state:
    dataset = streaming.training_dataset(cfg, shard_id, num_shards)
  else:
    dataset = datasets.training_dataset(cfg, feature_converter_cls, shard_id, num_shards)
  identity = datasets.identity(cfg, carry_state)
  updates = cfg.task_feature_lengths['targets'] // update_len if update_len else 1
  iterator = TrainingIterator(dataset, model_dir, updates, identity, (shard_id, num_shards))
  if num_shards < jax.process_count():
    iterator.go_on()
  return iterator


def name_in_sequences(mixture_or_task_name: str, module: str | None = None) -> str:
  """The name by which T5X's evaluation and inference find all tokens of a task or mixture.

  They read with SeqIO, which keeps the first T tokens of each example. What `cutting.cut` gives in
  the place of a task is registered, too, as the name and `_in_sequences`; files that are written
  are called as the task itself.

  Args:
    mixture_or_task_name: of a registered one.
    module: imported first, which registers it; None means nothing.

  Raises:
    ConfigError: if there is no such module, or none has this name.
  """
  provider = registered.task_or_mixture(mixture_or_task_name, module)
  found = cutting.cut(provider, other_features=True)
  if found is provider:
    return provider.name
  registry = seqio.MixtureRegistry if isinstance(found, seqio.Mixture) else seqio.TaskRegistry
  name = f'{provider.name}_in_sequences'
  registry.remove(name)  # Of an earlier call.
  registry.add_provider(name, found)
  return name


@origins.added_to_errors()
def check_task(cfg: utils.DatasetConfig, model: Model) -> None:
  """T5X's `verify_matching_vocabs_fn`; its own knows nothing of classes, nor of real numbers.

  Raises:
    ConfigError: if the task is not what the model is for.
  """
  model.check_task(cfg.mixture_or_task_name, cfg.module)


# The file beside a position that says of which share of the batches it is.
_SHARE = 'share'


class TrainingIterator(dataset_iterator.TfDatasetIterator):
  """Endless batches of one host, from the place that its run has come to.

  T5X's own goes on only with as many hosts as saved the position. It has read a batch ahead when
  the checkpoint before the first step is saved, and loses it if the run goes on from there. And in
  a run that starts from a checkpoint of another, it goes on in that one's data.
  """

  def __init__(
    self,
    dataset: tf.data.Dataset,
    model_dir: str,
    updates: int,
    identity: dict[str, Any],
    share: tuple[int, int] = (0, 1),
  ):
    """Starts at the first batch.

    Args:
      dataset: batches.
      model_dir: of the run; checkpoints in other folders are other runs'.
      updates: steps that a batch gives.
      identity: of the batches, see `datasets.identity`.
      share: which of how many shares of each batch these are.

    Raises:
      ConfigError: if the run's newest checkpoint has a position in other batches.
    """
    super().__init__(dataset, checkpoint=True)
    datasets.stop_with(self, self.iterator, dataset)
    self._model_dir, self._updates = epath.Path(model_dir).resolve(), updates
    self._batches, self._first_step = 0, 0
    self._identity = identity
    self._share = '{}-of-{}'.format(*share)
    for step in layout.steps_in(self._model_dir)[-1:]:
      self._check(layout.folder(self._model_dir, step))

  @origins.added_to_errors()
  def _check(self, checkpoint: epath.Path) -> None:
    if different := datasets.differences(layout.data_identity(checkpoint), self._identity):
      raise ConfigError(
        f'{checkpoint} is of another run: {"; ".join(different)}. Give another MODEL_DIR, or the '
        'settings of that run.'
      )

  def __next__(self) -> Any:
    batch = super().__next__()
    self._batches += 1
    return batch

  def save(self, filename: Any) -> None:
    """Saves the position of the step whose checkpoint the file is in."""
    path = epath.Path(filename)
    batches = self._batches
    if layout.step_of(_checkpoint(path)) == self._first_step:
      batches = 0  # What was read is for the steps after it.
    else:
      super().save(path)
    (path.parent / layout.BATCHES).write_text(str(batches))
    (path.parent / _SHARE).write_text(self._share)
    (path.parent / datasets.IDENTITY).write_text(datasets.identity_text(self._identity))

  def restore(self, filename: Any) -> None:
    """Goes to a position of this run; at one of another run, stays at the first batch.

    Args:
      filename: as T5X names it; other hosts, or the standalone runner, have left other files.
    """
    path = epath.Path(filename)
    checkpoint = _checkpoint(path)
    if checkpoint.parent.resolve() != self._model_dir:
      self._first_step = layout.step_of(checkpoint)
      old, new = layout.data_identity(checkpoint).get('vocabulary'), self._identity['vocabulary']
      if old not in (None, new):
        other = vocabularies.difference(old, new)
        logging.warning('%s was trained with another vocabulary: %s.', checkpoint, other)
      return
    batches = layout.batches_before(checkpoint, self._updates)
    if path.with_name(f'{path.name}.index').exists():
      super().restore(path)
      self._batches = batches
      return
    while self._batches < batches:
      next(self)

  def go_on(self) -> None:
    """Goes to the position of the run's newest checkpoint.

    Of the hosts that share a model or sequences, and so read the same, T5X has one save its
    position, and restores that one's only.
    """
    for step in layout.steps_in(self._model_dir)[-1:]:
      position = layout.folder(self._model_dir, step) / layout.DATASET
      same = (
        x.parent for x in position.glob(f'process_*/{_SHARE}') if x.read_text() == self._share
      )
      files = [x.with_suffix('') for folder in same for x in folder.glob('*.index')]
      self.restore(files[0] if files else position / 'none')


def _checkpoint(file: epath.Path) -> epath.Path:
  """The checkpoint that a file is in."""
  return next(path for path in file.parents if path.name.startswith(f'{layout.PREFIX}_'))
