"""T5X's Trainer with our parameter updates."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import clu.metrics
import jax
import jax.numpy as jnp
import optax
from t5x import metrics as t5x_metrics
from t5x import optimizers as t5x_optimizers
from t5x import partitioning as t5x_partitioning
from t5x import trainer as t5x_trainer

from tvq_t5x.common.errors import ConfigError, is_seed
from tvq_t5x.gin_support import origins
from tvq_t5x.network import sequence
from tvq_t5x.network.transformer import DecoderState
from tvq_t5x.t5x_adapter.more_writers import MoreWriters
from tvq_t5x.training import eval_step, partitioning, writers
from tvq_t5x.training import train_state as train_state_lib
from tvq_t5x.training.metrics import Metrics
from tvq_t5x.training.settings import TrainingSettings
from tvq_t5x.training.train_state import TrainState
from tvq_t5x.training.train_step import train_on_sequences


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedTrainer(TrainingSettings):
  """T5X's `trainer_cls`, after a look at the settings: gin makes it before T5X compiles anything.

  Gin files know it as `trainer.checked_trainer`.

  Attributes:
    train_dataset_cfg: training batches; T5X's class of this name has the same fields.
    eval_dataset_cfg: of T5X's training evaluation.
    partitioner: T5X's.
    relative_steps: parameter updates after the checkpoint, in place of total_steps.
    log_period: steps between training metrics; None means as T5X does.
    random_seed: that T5X is given for parameters and dropout; None means that it chooses one.
    writers: that get the metrics besides TensorBoard, see `writers`.
    ...: those of `TrainingSettings`.

  Raises:
    ConfigError: for settings that do not fit together.
  """

  partitioner: t5x_partitioning.PjitPartitioner
  relative_steps: int | None = None
  log_period: int | None = None
  random_seed: int | None = None
  writers: Sequence[Any] = ()

  def __post_init__(self):
    with origins.added_to_errors():
      self.check()

  @property
  def periods(self) -> dict[str, int | None]:
    """Numbers of steps that have to end with a batch, by name."""
    return {'relative_steps': self.relative_steps, **super().periods}

  def check(self) -> None:
    """Refuses settings that do not fit together."""
    super().check()
    writers.check(self.writers, 'checked_trainer.writers')
    seed = self.random_seed
    if seed is not None and not (is_seed(seed) and 0 <= seed < 2**32):
      raise ConfigError(
        'train.random_seed',
        seed,
        f'a whole number from 0 to {2**32 - 1}, as T5X takes any other for one of these, or None',
      )
    if self.partitioner.mesh.axis_names == (partitioning.DATA, partitioning.MODEL):
      self.check_placement(_Placement(self.partitioner))

  def __call__(self, **kwargs: Any) -> 'Trainer':
    """The trainer; arguments as T5X gives them."""
    rate = self.learning_rate
    return Trainer(
      update_len=self.update_len,
      segment_len=self.segment_len,
      num_microbatches=self.num_microbatches,
      writers=self.writers,
      learning_rate_fn=rate if callable(rate) else optax.constant_schedule(rate),
      **kwargs,
    )


checked_trainer = CheckedTrainer


class _Placement(partitioning.Partitioner):
  """T5X's partitioner as one of ours."""

  def __init__(self, partitioner: t5x_partitioning.PjitPartitioner):
    self.mesh = partitioner.mesh
    self.logical_axis_rules = partitioner.logical_axis_rules


class Trainer(t5x_trainer.Trainer):
  """Trains on batches of whole sequences, each in T / update_len steps.

  A step is a parameter update, here and in T5X's counts, periods and learning rate; the state of
  the model is carried from one to the next (truncated backpropagation). Bind it with
  `trainer_cls = @trainer.checked_trainer()`, which looks at the settings first.
  """

  def __init__(
    self,
    *args: Any,
    update_len: int | None = None,
    segment_len: int | None = None,
    writers: Sequence[Any] = (),
    **kwargs: Any,
  ):
    """Creates the trainer.

    Args:
      *args: as T5X's.
      update_len: tokens of each sequence that an update sees; None means all.
      segment_len: tokens of each sequence that are held at once; None means update_len.
      writers: that get the metrics too.
      **kwargs: as T5X's.
    """
    super().__init__(*args, **kwargs)
    self._update_len, self._segment_len = update_len, segment_len
    state = self.train_state
    step = 0 if state is None else int(state.step)  # t5x.eval sets it later.
    with origins.added_to_errors():
      self._more = MoreWriters(writers, kwargs.get('summary_dir'), step)

  def train(self, batch_iter: Any, num_steps: int, start_step: int | None = None) -> Any:
    """Trains for some updates.

    Args:
      batch_iter: batches of whole sequences.
      num_steps: updates, a multiple of those that a batch gives.
      start_step: updates so far; None asks the state.

    Returns:
      A future of the metrics of these updates, which are written too.

    Raises:
      ConfigError: if a batch would go on after the last update.
    """
    train_step = self._compiled_train_step or self._partitioned_train_step
    metrics: dict[str, Any] = {}
    with self._train_state_mutex:
      train_state = self.train_state
      start_step = int(train_state.step) if start_step is None else int(start_step)
      self.train_metrics_manager.start_duration_timer(block_on=train_state)
      step = start_step
      while step < start_step + num_steps:
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
          batch = next(batch_iter)
          self._check_steps(batch, num_steps)
          train_state, batch_metrics = train_step(train_state, batch)
        metrics = (
          t5x_trainer.merge_metrics(metrics, batch_metrics) if metrics else dict(batch_metrics)
        )
        step += self._updates(batch)
      self.train_state = train_state
    written = self.train_metrics_manager.write_metrics_summary(metrics, step, step - start_step)
    self._more.trained(step, written)
    return written

  def eval(self, batch_iters: Mapping[str, Any]) -> Any:
    """Evaluates as T5X does, and gives the metrics to the other writers."""
    found = super().eval(batch_iters)
    self._more.evaluated(int(self.train_state.step), found)
    return found

  def close(self) -> None:
    """Writes what is left."""
    super().close()
    self._more.close()

  @origins.added_to_errors()
  def _check_steps(self, batch: Mapping[str, jax.Array], num_steps: int) -> None:
    if num_steps % self._updates(batch):
      raise ConfigError(
        f'T5X asks for {num_steps} steps, and a batch gives {self._updates(batch)}: give a '
        'checked_trainer.update_len, a train.total_steps and, if they are set, '
        'SaveCheckpointConfig.checkpoint_steps with which steps from the checkpoint that training '
        'starts from are a multiple of that.'
      )

  def _updates(self, batch: Mapping[str, jax.Array]) -> int:
    length = self._model.batch_shape(batch)[1]
    return length // (self._update_len or length)

  @functools.cached_property
  def _partitioned_train_step(self) -> Any:
    state_axes, batch_axes = self._train_state_axes, self._partitioner.data_partition_spec

    def train_step(train_state: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, Metrics]:
      num_sequences, length = self._model.batch_shape(batch)
      with self._sequences_shared:
        state, metrics = train_on_sequences(
          self._model,
          TrainState(
            train_state.step,
            train_state.params,
            train_state.param_states,
            self._carried(train_state, num_sequences),
          ),
          batch,
          self._base_rng,
          self._update_len or length,
          self._num_microbatches or 1,
          num_shards=self._partitioner.get_data_layout(num_sequences).num_shards,
          segment_len=self._segment_len,
        )
      optimizer_state = t5x_optimizers.OptimizerState(state.step, state.opt_state)
      arrays = self._model.optimizer_def.state_dict(state.params, optimizer_state)
      if state.carried is not None:
        arrays['flax_mutables'] = {'carried': train_state_lib.to_dict(state.carried)}
      return train_state.restore_state(arrays), self._summed(
        metrics, state.step, num_sequences * length
      )

    return self._partitioner.partition(
      train_step,
      in_axis_resources=(state_axes, batch_axes),
      out_axis_resources=(state_axes, None),
      donate_argnums=(0,),
    )

  @property
  def _sequences_shared(self) -> Any:
    """A context for what is traced, as `Partitioner.jit` enters it."""
    return sequence.shared_by(self._partitioner.mesh, self._partitioner.logical_axis_rules)

  def _carried(self, train_state: Any, batch_size: int) -> DecoderState | None:
    """The state of the batch before, as the model knows it."""
    if not self._model.carry_state:
      return None
    like = jax.eval_shape(lambda: self._model.init_state(batch_size))
    carried = train_state_lib.from_dict(like, train_state.flax_mutables['carried'])
    return cast(DecoderState, carried)

  @functools.cached_property
  def _partitioned_eval_step(self) -> Any:
    def step(train_state: Any, batch: Mapping[str, jax.Array]) -> Metrics:
      # As in training, a part at a time: whole sequences would need more memory than training.
      length = self._model.batch_shape(batch)[1]
      segment_len = self._segment_len or self._update_len or length
      with self._sequences_shared:
        return eval_step.batch_metrics(self._model, train_state.params, batch, segment_len)

    return self._partitioner.partition(
      step,
      in_axis_resources=(self._train_state_axes, self._partitioner.data_partition_spec),
      out_axis_resources=None,
    )

  def _summed(self, metrics: Metrics, step: jax.Array, num_tokens: int) -> Any:
    """Metrics of a batch from those of its updates, with what T5X's own trainer adds."""
    updates = metrics['loss'].count.shape[0]
    learning_rate = jnp.asarray(self._learning_rate_fn(step - 1))
    return {
      **jax.tree.map(jnp.sum, metrics),
      'learning_rate': clu.metrics.LastValue.from_model_output(learning_rate[None]),
      'timing/steps_per_second': t5x_metrics.StepsPerTime.from_model_output(steps=updates),
      'timing/tokens_per_second': t5x_metrics.TimeRate.from_model_output(numerator=num_tokens),
    }
