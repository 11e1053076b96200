"""What tests of meshes and microbatches share: a small model with all dropouts, and comparisons."""

import functools

import jax
import numpy as np
import optax

from tvq_t5x.common import named_arrays
from tvq_t5x.training import optimizers

TOLERANCE = 1e-5  # Of the largest entry of each array.
SIZES = {
  'vocab_size': 32,
  'emb_dim': 32,
  'key_dim': 16,
  'num_codes': 16,
  'block_len': 8,
  'window_len': 8,
  'ema_decay': 0.9,
  'sinusoid_dropout_rate': 0.1,
  'residual_dropout_rate': 0.2,
  'layer_drop_rate': 0.2,
}
OPTIMIZERS = {
  'sgd': functools.partial(optax.sgd, 0.1),
  'adamw': functools.partial(optimizers.adamw, 3e-3, weight_decay=1e-2, clip_norm=0.1),
  'adafactor': functools.partial(optimizers.adafactor, 1e-2, weight_decay=1e-2, clip_norm=0.1),
  'lion': functools.partial(optimizers.lion, 1e-3, weight_decay=1e-2, clip_norm=0.1),
}


def by_name(tree):
  """Leaves by their names, with slashes."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {named_arrays.array_name(path): leaf for path, leaf in leaves}


def on_host(arrays):
  """Arrays by name, in double precision."""
  return {name: np.asarray(x, np.float64) for name, x in jax.device_get(arrays).items()}


def shard_shapes(arrays):
  """Of what one device has of each array."""
  return {name: x.addressable_shards[0].data.shape for name, x in arrays.items()}


def assert_same_numbers(found, expected, tolerance=TOLERANCE):
  """The same names, and arrays within a tolerance relative to the largest entry of each."""
  assert found.keys() == expected.keys()
  wrong = {}
  for name, x in expected.items():
    difference = np.max(np.abs(np.subtract(found[name], x, dtype=np.float64)))
    if not difference <= tolerance * max(np.max(np.abs(x)), 1e-30):
      wrong[name] = difference
  assert not wrong, wrong
