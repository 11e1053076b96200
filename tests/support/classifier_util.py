"""Small classifiers with random parameters and data, shared by tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import seqio
from util import small_config

from tvq_t5x.data.classification import Format
from tvq_t5x.network.classifier import Classifier
from tvq_t5x.training.classifier import ClassifierModel

# Every kind of layer; the mixers of one have what they need of the others' settings.
ENCODERS = {
  'shga': {},
  'mha': {'head_type': 'mha', 'num_heads': 2},
  'mqa': {'head_type': 'mqa', 'num_heads': 2},
  'quadratic': {'attention_type': 'quadratic'},
  'longvq': {'sublayers': ('longvq', 'mlp')},
}
NUM_CLASSES = 3


def encoder_config(**overrides):
  return small_config(bidirectional=True, **overrides)


def small_classifier(optimizer=None, real=False, pair=False, **overrides) -> ClassifierModel:
  config = encoder_config(**overrides)
  vocabulary = None if real else seqio.PassThroughVocabulary(config.vocab_size)
  return ClassifierModel(config, Format(vocabulary, NUM_CLASSES, pair), optimizer or optax.sgd(0.1))


def random_classifier_params(module: Classifier, seed: int = 0):
  """Parameters all different from their initial values: zero biases would hide mistakes."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *module.example_inputs(1)))

  def draw(path, x):
    if path[-1].key in ('c_count', 'scale'):
      return jnp.asarray(rng.uniform(0.5, 2.0, x.shape), jnp.float32)
    if path[-1].key == 'log_dt':
      return jnp.asarray(rng.uniform(-4.0, -1.0, x.shape), jnp.float32)
    return jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes['params'])


def random_examples(model: ClassifierModel, batch_size: int, length: int, seed: int = 0):
  """A batch of its model, of all lengths; the last row is none."""
  rng, batch = np.random.default_rng(seed), {}
  for name, spec in model.batch_spec(batch_size, length).items():
    if spec.dtype == jnp.float32:
      batch[name] = rng.normal(size=spec.shape).astype(np.float32)
    else:
      high = NUM_CLASSES if name == 'label' else model.config.vocab_size
      batch[name] = rng.integers(0, high, spec.shape).astype(np.int32)
  batch['label_weights'] = np.append(np.ones(batch_size - 1), 0).astype(np.float32)
  for suffix in ('', '_2') if model.module.pair else ('',):
    sizes = rng.integers(1, length + 1, batch_size).astype(np.int32)
    sizes[-1] = 0
    batch[f'encoder_lengths{suffix}'] = sizes
    batch[f'encoder_input_tokens{suffix}'] *= np.arange(length) < sizes[:, None]
  return jax.tree.map(jnp.asarray, batch)
