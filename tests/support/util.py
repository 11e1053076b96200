"""A small model with random parameters and data, and helpers, shared by tests."""

import contextlib
import json
import pathlib
import re
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio

from tvq_t5x.data import datasets
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.mixers import Call
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.training.models import TransformerVQModel

HEADS = {
  'gated_single': {'head_type': 'gated', 'num_heads': 1},
  'gated_multi': {'head_type': 'gated', 'num_heads': 2},
  'mha': {'head_type': 'mha', 'num_heads': 2},
  'mqa': {'head_type': 'mqa', 'num_heads': 3},
}
# Quick to compile, where the kind of layer does not matter.
LIGHT = {'num_layers': 1, 'head_type': 'mha', 'scan_layers': False}


def cases(fields, slow=()):
  """A parameter for each of some cases by name, those whose names are in `slow` marked so."""
  marks = {name: pytest.mark.slow if name in slow else () for name in fields}
  return [pytest.param(x, id=name, marks=marks[name]) for name, x in fields.items()]


def small_config(**overrides) -> TransformerConfig:
  # The window is no multiple of the block, and the codes are few enough to repeat.
  fields = {
    'vocab_size': 11,
    'emb_dim': 8,
    'key_dim': 4,
    'value_dim': 6,
    'num_layers': 2,
    'num_codes': 5,
    'block_len': 4,
    'window_len': 3,
  }
  return TransformerConfig(**{**fields, **overrides})


def small_model(optimizer=None, **overrides) -> TransformerVQModel:
  config = small_config(**overrides)
  vocabulary = seqio.PassThroughVocabulary(config.vocab_size)
  return TransformerVQModel(Transformer(config), vocabulary, optimizer or optax.sgd(0.1))


def param_shapes(config: TransformerConfig):
  """Shapes of the parameters, without allocating them."""
  init = Transformer(config).init
  return jax.eval_shape(init, jax.random.key(0), jnp.zeros([1, 1], jnp.int32))


def random_params(config: TransformerConfig, seed: int = 0):
  """Parameters all different from their initial values: zero biases would hide mistakes."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    if path[-1].key == 'c_count':
      return jnp.asarray(rng.uniform(0.5, 2.0, x.shape), jnp.float32)
    if path[-1].key == 'scale':
      return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32)
    width = {'kernel': 0.4, 'c_sum': 0.7}.get(path[-1].key, 1.0)
    return jnp.asarray(width * rng.normal(size=x.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, param_shapes(config)['params'])


def random_tokens(config: TransformerConfig, *shape: int, seed: int = 0) -> jax.Array:
  """Any ids but 0, which is padding."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(1, config.vocab_size, shape), jnp.int32)


def call_of(mask, position=0, **fields) -> Call:
  """What sublayers are told of a batch [B, T] whose positions count as the mask says."""
  batch_size = len(mask)
  fields = {'lengths': None, 'step': None, 'example_ids': jnp.arange(batch_size), **fields}
  position = jnp.full([batch_size], position, jnp.int32)
  return Call(position=position, loss_mask=jnp.asarray(mask, jnp.float32), **fields)


def random_batch(config: TransformerConfig, *shape: int, seed: int = 0) -> dict[str, jax.Array]:
  """Sequences of which the last few positions of the last ones are padding."""
  targets = np.array(random_tokens(config, *shape, seed=seed))
  weights = np.ones(shape, np.float32)
  weights[-1, -3:] = 0
  targets[weights == 0] = 0
  inputs = np.concatenate([np.ones([shape[0], 1], np.int32), targets[:, :-1]], axis=1)
  return {
    'decoder_input_tokens': jnp.asarray(inputs),
    'decoder_target_tokens': jnp.asarray(targets),
    'decoder_loss_weights': jnp.asarray(weights),
  }


def assert_close(ours, expected, atol=1e-5, rtol=1e-5):
  """Same structure, and leaves within a tolerance."""
  assert jax.tree.structure(ours) == jax.tree.structure(expected)
  leaves = jax.tree_util.tree_leaves_with_path(ours)
  for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
    assert jnp.shape(a) == jnp.shape(b), jax.tree_util.keystr(path)
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, atol=atol, rtol=rtol, err_msg=jax.tree_util.keystr(path))


def next_batch(folder, step):
  """The batch after a checkpoint, as lists."""
  # Whatever the checkpoint says that it was for.
  position = pathlib.Path(folder) / f'checkpoint_{step}' / 'dataset'
  saved = json.loads((position / 'config.json').read_text())
  assert not saved.pop('carry_state') and saved.pop('vocabulary') == 'bytes'
  cfg = datasets.DatasetConfig(**saved)
  batches = datasets.training_batches(cfg, TransformerVQFeatureConverter)
  batches.restore(position)
  return {name: value.tolist() for name, value in next(batches).items()}


def without_vocabulary(run, folder):
  """A copy of a run as of an earlier version, which did not say of what vocabulary it is."""
  shutil.copytree(run, folder)
  for path in folder.glob('checkpoint_*/dataset/config.json'):
    saved = json.loads(path.read_text())
    del saved['vocabulary']
    path.write_text(json.dumps(saved))
  return folder


@contextlib.contextmanager
def one_device():
  """JAX as it is on a machine with one device, for which programs are compiled most quickly."""
  one = jax.devices()[:1]
  with mock.patch.object(jax, 'devices', lambda *args: one):
    yield


def lines_in_loops(program: str) -> list[str]:
  """Lines of a compiled program that are carried out more than once: all within its loops."""
  computations = dict(
    re.findall(r'^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}', program, re.MULTILINE | re.DOTALL)
  )
  left, seen = set(re.findall(r'body=%([\w.-]+)', program)), set()
  while left:
    seen.add(name := left.pop())
    left |= set(re.findall(r'(?:calls|body)=%([\w.-]+)', computations[name])) - seen
  return [line for name in seen for line in computations[name].splitlines()]


def computed(metrics) -> dict[str, float]:
  """The values of clu metrics."""
  return {name: float(metric.compute()) for name, metric in metrics.items()}
