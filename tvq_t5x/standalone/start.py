"""Where a run starts: at step 0, at a checkpoint of another run, or at its own newest one."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
from absl import logging

from tvq_t5x.checkpoints.manager import Checkpoints, initial_state
from tvq_t5x.data.datasets import TrainingIterator
from tvq_t5x.standalone.evaluation import Sums
from tvq_t5x.standalone.run_settings import RunSettings
from tvq_t5x.training import placement
from tvq_t5x.training.train_state import TrainState, init_train_state


class Start(NamedTuple):
  """The state of a run before its next batch.

  Attributes:
    state: to train.
    window: sums of training metrics that are still to be written.
    saved: whether the run has a checkpoint of it.
  """

  state: TrainState
  window: Sums
  saved: bool


def from_newest(
  settings: RunSettings, checkpoints: Checkpoints, batches: TrainingIterator, shardings: TrainState
) -> Start:
  """The newest checkpoint of a run; `batches` go to its position.

  Args:
    settings: of the run.
    checkpoints: of the run.
    batches: for training.
    shardings: of the state.

  Raises:
    ConfigError: if the data position belongs to other settings.
    CheckpointError: if there is none that can be read.
  """
  init = functools.partial(init_train_state, settings.model, batch_size=settings.batch_size)
  abstract = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(init, jax.random.key(0)),
    shardings,
  )
  restored = checkpoints.restore(abstract, batches, settings.updates)
  logging.info('Continuing from the checkpoint of step %d.', int(restored.state.step))
  return Start(restored.state, Sums(restored.metadata.get('window')), saved=True)


def of_a_new_run(settings: RunSettings, initial: pathlib.Path | None, rng: Any) -> Start:
  """Step 0, or a checkpoint of another run.

  Args:
    settings: of the run.
    initial: that checkpoint; None means step 0.
    rng: key of the parameters.

  Raises:
    CheckpointError: if it can't be read.
  """
  state = placement.init_state(settings.partitioner, settings.model, rng, settings.batch_size)
  if initial:
    state = initial_state(initial, state)
    logging.info('Starting from %s.', initial)
  return Start(state, Sums(), saved=False)
