"""The encoder: its layers beside attention to all pairs, its mean and its head, and padding."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from classifier_util import ENCODERS, NUM_CLASSES, encoder_config, random_classifier_params
from util import assert_close, cases

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network import quadratic
from tvq_t5x.network.classifier import Classifier
from tvq_t5x.network.mixers import Mixer
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.network.vq import mixer as vq

LENGTH = 13  # No whole number of blocks of 4.
SIZES = np.array([13, 5, 1], np.int32)


def draw(seed=0, real=False):
  rng = np.random.default_rng(seed)
  shape = len(SIZES), LENGTH
  x = rng.normal(size=shape).astype(np.float32) if real else rng.integers(0, 11, shape)
  return jnp.asarray(x)


def classify(module, params, *inputs, **kwargs):
  return module.apply({'params': params}, *inputs, **kwargs)[0]


def as_all_pairs(queries, keys, distances, codebook, mask, block_len):
  """What `bidirectional_attention` computes, as attention to all pairs of positions."""
  del codebook, block_len
  return quadratic.all_pairs_attention(queries, keys.quantized, keys.values, distances, mask)


@pytest.mark.parametrize(
  'kind', cases({name: name for name in ENCODERS if name != 'quadratic'}, slow={'mha'})
)
def test_attention_in_linear_time_is_attention_to_all_pairs(kind):
  """Logits, and where all blocks are neighbours, every gradient."""

  def check(length, what):
    module = Classifier(encoder_config(**ENCODERS[kind]), NUM_CLASSES)
    params = random_classifier_params(module)
    inputs = draw()[:, :length], np.minimum(SIZES, length)
    found = jax.jit(what(module))(params, *inputs)
    with mock.patch.object(vq, 'bidirectional_attention', as_all_pairs):
      expected = jax.jit(what(module))(params, *inputs)
    assert_close(found, expected, atol=2e-4, rtol=2e-4)

  def logits(module):
    return lambda params, *x: classify(module, params, *x)

  def gradients(module):
    weights = np.random.default_rng(1).normal(size=[len(SIZES), NUM_CLASSES])
    return jax.grad(lambda params, *x: jnp.sum(weights * classify(module, params, *x)))

  check(LENGTH, logits)
  check(7, gradients)


@pytest.mark.parametrize('real', [False, True])
@pytest.mark.parametrize('kind', ENCODERS)
def test_padding_changes_nothing(kind, real):
  """Neither what it holds nor how much of it there is."""
  module = Classifier(encoder_config(**ENCODERS[kind]), NUM_CLASSES, real_inputs=real)
  params, x = random_classifier_params(module), draw(real=real)
  padding = np.arange(LENGTH) >= SIZES[:, None]
  run = jax.jit(lambda x: classify(module, params, x, SIZES))
  logits = run(x)
  np.testing.assert_array_equal(run(jnp.where(padding, 3 - x, x)), logits)
  longer = jnp.pad(x, [(0, 0), (0, 4)], constant_values=2)
  assert_close(run(longer), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('kind', cases({name: name for name in ENCODERS}, slow={'mha'}))
def test_every_position_sees_what_comes_after_it(kind):
  """Through one layer: the mean over the first position alone."""
  module = Classifier(
    encoder_config(**ENCODERS[kind], num_layers=1, scan_layers=False), NUM_CLASSES
  )
  params, x = random_classifier_params(module), draw()[:1]

  @jax.jit
  def after_the_layer(x):
    found = module.apply(
      {'params': params},
      x,
      SIZES[:1],
      capture_intermediates=lambda module, method: module.name == 'layers_0',
      mutable=['intermediates'],
    )[1]
    ((out, *_),) = found['intermediates']['layers_0']['__call__']
    return out

  seen = [after_the_layer(x.at[0, -1].set(last)) for last in (1, 2)]
  assert np.max(np.abs(seen[0][0, 0] - seen[1][0, 0])) > 1e-5


@pytest.mark.slow
def test_the_mean_is_over_tokens_and_two_texts_are_read_by_one_encoder():
  config = encoder_config(num_layers=1, scan_layers=False)
  one = Classifier(config, NUM_CLASSES)
  two = Classifier(config, NUM_CLASSES, pair=True)
  params = random_classifier_params(two)
  a, b = draw(0), draw(1)
  seen = {}

  def keep(next_fun, args, kwargs, context):
    name, out = context.module.name, next_fun(*args, **kwargs)
    seen[name] = (args, out)
    return out

  with nn.intercept_methods(keep):
    logits = classify(two, params, a, SIZES, b, SIZES[::-1])
    features, stream = np.asarray(seen['head'][0][0]), np.asarray(seen['layers_0'][1][0])
  means = [
    np.stack([x[:n].mean(axis=0) for x, n in zip(stream[i::2], sizes, strict=True)])
    for i, sizes in enumerate((SIZES, SIZES[::-1]))
  ]
  expected = np.concatenate([*means, means[0] * means[1], means[0] - means[1]], axis=1)
  np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
  head = jax.tree.map(np.asarray, {name: params[name] for name in ('head', 'logits')})
  hidden = jax.nn.gelu(expected @ head['head']['kernel'] + head['head']['bias'])
  found = np.asarray(hidden) @ head['logits']['kernel'] + head['logits']['bias']
  np.testing.assert_allclose(logits, found, rtol=1e-4, atol=1e-4)
  # Alone, a text has the mean that it has beside another.
  alone = {**params, 'head': {**params['head'], 'kernel': params['head']['kernel'][:8]}}
  with nn.intercept_methods(keep):
    classify(one, alone, b, SIZES[::-1])
  np.testing.assert_allclose(seen['head'][0][0], means[1], rtol=1e-4, atol=1e-5)


def test_dropout_follows_the_examples():
  """Not their places: rows in another order, with their ids, have the same masks."""
  config = encoder_config(residual_dropout_rate=0.3, layer_drop_rate=0.3)
  module = Classifier(config, NUM_CLASSES, pair=True)
  params, a, b = random_classifier_params(module), draw(0), draw(1)
  order = np.array([2, 0, 1])

  def run(rows):
    args = a[rows], SIZES[rows], b[rows], SIZES[rows]
    rngs = {'dropout': jax.random.key(1), 'sequence_dropout': jax.random.key(2)}
    return classify(module, params, *args, example_ids=rows, deterministic=False, rngs=rngs)

  np.testing.assert_allclose(run(order), run(np.arange(3))[order], rtol=1e-5, atol=1e-5)


class Causal(Mixer):
  """A mixer that says nothing of encoders."""

  def __call__(self, x, state, call):
    return x, (), {}


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Classifier(encoder_config(window_len=5), 3), 'window_len = 5 .* at most .* = 4'),
    (lambda: Classifier(encoder_config(sublayers=(Causal,)), 3), 'Causal can be in no encoder'),
    (lambda: Classifier(encoder_config(), 0), 'Classifier.num_classes = 0'),
    (lambda: encoder_config(compressed_cache=False), 'compressed_cache = False'),
    (lambda: Transformer(encoder_config()), 'bidirectional = True .* language model'),
  ],
)
def test_refusals(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
