"""A few updates of a small model, in T5X's trainer on a mesh and without T5X on one device."""

import functools

import jax
import numpy as np
import seqio
import t5x_runs
from util import random_batch

from tvq_t5x import checkpoint_layout, optimizers
from tvq_t5x.config import TransformerConfig
from tvq_t5x.models import TransformerVQModel
from tvq_t5x.train_step import init_train_state, train_on_sequences
from tvq_t5x.transformer import Transformer

TOLERANCE = 1e-5  # Of the largest entry of each array.
BATCH_SIZE, LENGTH, UPDATE_LEN, BATCHES = 8, 32, 16, 2
STEPS = BATCHES * LENGTH // UPDATE_LEN
SIZES = {
  'vocab_size': 32,
  'emb_dim': 32,
  'key_dim': 16,
  'num_layers': 1,
  'num_codes': 16,
  'block_len': 8,
  'window_len': 8,
  'ema_decay': 0.9,
  'sinusoid_dropout_rate': 0.1,
  'residual_dropout_rate': 0.2,
  'layer_drop_rate': 0.2,
  'scan_layers': False,
  'remat': 'none',
}
OPTIMIZERS = {
  'adamw': functools.partial(optimizers.adamw, 3e-3, weight_decay=1e-2, clip_norm=0.1),
  'adafactor': functools.partial(optimizers.adafactor, 1e-2, weight_decay=1e-2, clip_norm=0.1),
  'lion': functools.partial(optimizers.lion, 1e-3, weight_decay=1e-2, clip_norm=0.1),
}


def make_model(optimizer, **fields):
  module = Transformer(TransformerConfig(**{**SIZES, **fields}))
  return TransformerVQModel(module, seqio.PassThroughVocabulary(32), OPTIMIZERS[optimizer]())


def _batches(model):
  return [random_batch(model.config, BATCH_SIZE, LENGTH, seed=i) for i in range(BATCHES)]


class Run:
  """The end of some updates.

  Attributes:
    numbers: arrays by name as in a checkpoint, and metrics.
    shapes: of what a device has of each array.
  """

  def __init__(self, model, folder, shape, dims=(1, 1), num_microbatches=1):
    trainer = t5x_runs.trainer(model, folder, shape, dims, UPDATE_LEN, num_microbatches)
    with trainer:
      metrics = trainer.train(iter(_batches(model)), STEPS).result()
    state = t5x_runs.by_name(trainer.train_state.state_dict())
    self.shapes = shard_shapes(state)
    self.numbers = _on_host(state)
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
  return _on_host(t5x_runs.by_name(checkpoint_layout.state_dict(state)))


def _on_host(state):
  return {name: np.asarray(x, np.float64) for name, x in jax.device_get(state).items()}


def shard_shapes(state):
  return {name: x.addressable_shards[0].data.shape for name, x in state.items()}


def assert_same(run, reference):
  """The numbers of both within the tolerance."""
  assert run.numbers.keys() == reference.numbers.keys()
  assert run.numbers['state/step'] == STEPS
  wrong = {}
  for name, x in reference.numbers.items():
    difference = np.max(np.abs(run.numbers[name] - x)) / max(np.max(np.abs(x)), 1e-30)
    if not difference <= TOLERANCE:
      wrong[name] = difference
  assert not wrong
