"""A few updates of a small model, in T5X's trainer on a mesh and without T5X on one device."""

import jax
import numpy as np
import seqio
import t5x_runs
from mesh_util import (
  OPTIMIZERS,
  SIZES,
  TOLERANCE,
  assert_same_numbers,
  by_name,
  on_host,
  shard_shapes,
)
from util import random_batch

from tvq_t5x.checkpoints import layout
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.t5x_adapter.optimizer import OptaxWrapper
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.train_state import init_train_state
from tvq_t5x.training.train_step import train_on_sequences

BATCH_SIZE, LENGTH, UPDATE_LEN, BATCHES = 8, 32, 16, 2
STEPS = BATCHES * LENGTH // UPDATE_LEN
ONE_LAYER = {**SIZES, 'num_layers': 1, 'scan_layers': False, 'remat': 'none'}


def make_model(optimizer, **fields):
  module = Transformer(TransformerConfig(**{**ONE_LAYER, **fields}))
  return TransformerVQModel(
    module, seqio.PassThroughVocabulary(32), OPTIMIZERS[optimizer](), optimizer_wrapper=OptaxWrapper
  )


def _batches(model):
  return [random_batch(model.config, BATCH_SIZE, LENGTH, seed=i) for i in range(BATCHES)]


class Run:
  """The end of some updates.

  Attributes:
    numbers: arrays by name as in a checkpoint, and metrics.
    shapes: of what a device has of each array.
  """

  def __init__(self, model, folder, shape, dims=(1, 1), num_microbatches=1, by_sequence=False):
    places = t5x_runs.partitioner(shape, dims, by_sequence)
    trainer = t5x_runs.trainer(model, folder, places, UPDATE_LEN, num_microbatches)
    with trainer:
      metrics = trainer.train(iter(_batches(model)), STEPS).result()
    state = by_name(trainer.train_state.state_dict())
    self.shapes = shard_shapes(state)
    self.numbers = on_host(state)
    own = ('timing/', 'learning_rate')
    self.numbers |= {k: x.value for k, x in metrics.items() if not k.startswith(own)}


class Reference:
  """What a `Run` is compared with; `start` are the numbers before the first update."""

  def __init__(self, model):
    step = jax.jit(
      lambda state, batch: train_on_sequences(model, state, batch, jax.random.key(2), UPDATE_LEN)
    )
    state = jax.jit(lambda: init_train_state(model, jax.random.key(1)))()
    self.start, total = _by_name(state), None
    for batch in _batches(model):
      state, metrics = step(state, batch)
      metrics = jax.tree.map(lambda x: np.asarray(x).sum(), metrics)
      total = metrics if total is None else jax.tree.map(np.add, total, metrics)
    self.numbers = _by_name(state) | {k: x.total / x.count for k, x in total.items()}


def _by_name(state):
  return on_host(by_name(layout.state_dict(state)))


def assert_same(run, reference, tolerance=TOLERANCE):
  """The numbers of both within the tolerance."""
  assert run.numbers['state/step'] == STEPS
  assert_same_numbers(run.numbers, reference.numbers, tolerance)
