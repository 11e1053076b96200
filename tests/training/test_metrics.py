import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from util import computed, random_params, random_tokens, small_config

from tvq_t5x.data import likelihood
from tvq_t5x.network.mixers import Loss, Ratio, Statistics
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.training import metrics as metrics_lib

pytestmark = pytest.mark.quick

WEIGHTS = np.array([[1, 1, 1, 0], [1, 0, 0, 0]], np.float32)


def metrics_of(rows):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 4, 6)).astype(np.float32)
  targets = np.array([[5, 3, 0, 2], [1, 4, 4, 4]], np.int32)
  targets[0, 1] = logits[0, 1].argmax()
  nats = rng.uniform(1, 2, size=(2, 4)).astype(np.float32)
  bytes_per_token = np.array([0, 0, 1, 2, 3, 4], np.float32)
  arrays = (logits, nats, targets, WEIGHTS)
  metrics = metrics_lib.token_metrics(*(x[rows] for x in arrays), bytes_per_token)
  return metrics, arrays, bytes_per_token


def test_token_metrics():
  metrics, (logits, nats, targets, weights), bytes_per_token = metrics_of(slice(None))
  values = computed(metrics)
  total = (weights * nats).sum()
  np.testing.assert_allclose(values['cross_entropy'], total / 4, rtol=1e-6)
  hits = (weights * (logits.argmax(-1) == targets)).sum()
  assert hits > 0
  np.testing.assert_allclose(values['accuracy'], hits / 4, rtol=1e-6)
  num_bytes = (weights * bytes_per_token[targets]).sum()
  np.testing.assert_allclose(values['bits_per_byte'], total / np.log(2) / num_bytes, rtol=1e-6)


def test_accuracy_is_of_targets_that_no_logit_exceeds():
  logits = jnp.array([[[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [0.0, jnp.nan, 1.0]]])
  targets, ones = jnp.array([[1, 2, 2]]), jnp.ones([1, 3])
  metrics = metrics_lib.token_metrics(logits, ones, targets, ones, None)
  np.testing.assert_allclose(computed(metrics)['accuracy'], 1 / 3, rtol=1e-6)


def test_merged_parts_equal_the_whole():
  """Sums and counts, not means, since rows have different numbers of tokens."""
  whole = metrics_of(slice(None))[0]
  first, second = metrics_of(slice(1))[0], metrics_of(slice(1, 2))[0]
  merged = {name: first[name].merge(second[name]) for name in whole}
  added = jax.tree.map(jnp.add, first, second)
  for parts in (merged, added):
    for name, value in computed(whole).items():
      np.testing.assert_allclose(computed(parts)[name], value, rtol=1e-6)


def aux_of(layers, *sublayers):
  """What a VQ sublayer has to say for each True, and an MLP for each False."""
  rng = np.random.default_rng(0)

  def draw():
    return jnp.asarray(rng.uniform(1, 2, layers), jnp.float32)

  return tuple(
    {
      'commit_loss': Loss(draw(), draw()),
      'codebook_statistics': Statistics(jnp.zeros(layers)),
      'quantization_error': Ratio(draw(), draw()),
    }
    if vq
    else {}
    for vq in sublayers
  )


def test_metrics_of_each_sublayer():
  aux = aux_of(3, True, False, True)
  values = computed(metrics_lib.sublayer_metrics(aux, jnp.float32(4)))
  expected = {'commit_loss': sum(aux[j]['commit_loss'].total.sum() for j in (0, 2)) / 4}
  for i, j in itertools.product(range(3), (0, 2)):
    ratio = aux[j]['quantization_error']
    expected[f'quantization_error/layer_{i}_{j}'] = ratio.total[i] / ratio.count[i]
  assert values.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(values[name], value, rtol=1e-6)


def test_single_sublayers_have_short_names():
  names = metrics_lib.sublayer_metrics(aux_of(2, True, False), jnp.float32(1)).keys()
  assert {name.split('/')[1] for name in names if '/' in name} == {'layer_0', 'layer_1'}
  assert not metrics_lib.sublayer_metrics(aux_of(2, False), jnp.float32(1))


def test_likelihood_of_a_split():
  aux = {'num_tokens': [3.0, 1.0], 'num_bytes': [2.0, 0.0]}
  values = likelihood.likelihood(['ab', ''], ([-4.0, -1.5], aux))
  assert values == {'cross_entropy': 5.5 / 4, 'bits_per_byte': 5.5 / np.log(2) / 2}
  del aux['num_bytes']
  assert likelihood.likelihood(['ab', ''], ([-4.0, -1.5], aux)).keys() == {'cross_entropy'}
  with pytest.raises(ValueError, match='2 scores for 1 examples'):
    likelihood.likelihood(['ab'], ([-4.0, -1.5], aux))


@pytest.mark.parametrize('scan_layers', [True, False])
def test_code_usage_is_what_perplexity_is_of(scan_layers):
  config = small_config(sublayers=('vq', 'mlp', 'vq'), scan_layers=scan_layers)
  params = random_params(config)
  usage = metrics_lib.code_usage(params, config)
  assert list(usage) == [f'code_usage/layer_{i}_{j}' for i in (0, 1) for j in (0, 2)]
  apply = jax.jit(lambda x: Transformer(config).apply({'params': params}, x)[2])
  said = metrics_lib.sublayer_metrics(apply(random_tokens(config, 1, 8)), jnp.float32(8))
  for name, value in computed(said).items():
    if name.startswith('codebook_perplexity'):
      shares = usage[name.replace('codebook_perplexity', 'code_usage')] / config.num_codes
      np.testing.assert_allclose(np.exp(-np.sum(shares * np.log(shares))), value, rtol=1e-5)


def test_code_usage_of_a_codebook_that_has_not_started():
  config = small_config(head_type='mha', num_heads=2, num_layers=1)
  params = jax.tree.map(lambda x: jnp.zeros(x.shape), random_params(config))
  (usage,) = metrics_lib.code_usage(params, config).values()
  np.testing.assert_array_equal(usage, np.zeros(2 * config.num_codes))
