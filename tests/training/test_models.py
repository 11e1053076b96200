"""Losses, scores and samples against the network's logits and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio
from util import (
  LIGHT,
  assert_close,
  computed,
  random_batch,
  random_params,
  small_config,
  small_model,
)

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.training.models import DropoutRngs, TransformerVQModel


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def picks(logits, targets):
  """Log-likelihood of each target."""
  return np.take_along_axis(log_softmax(logits), np.asarray(targets)[..., None], axis=-1)[..., 0]


@pytest.fixture(scope='module')
def setup():
  model = small_model(**LIGHT)
  params, batch = random_params(model.config), random_batch(model.config, 3, 8)
  logits, _, aux = jax.jit(model.module.apply)(
    {'params': params},
    batch['decoder_input_tokens'],
    loss_mask=batch['decoder_loss_weights'],
  )
  return model, params, batch, logits, aux


def test_loss_is_over_all_positions_and_padding_counts_as_zero(setup):
  model, params, batch, logits, aux = setup
  nats = -picks(logits, batch['decoder_target_tokens']) * batch['decoder_loss_weights']
  loss, metrics = jax.jit(model.eval_fn)(params, batch)
  commit = aux[0]['commit_loss'].total.sum()
  expected = (nats.sum() + model.config.commit_weight * commit) / 24
  assert_close(loss, np.float32(expected))
  values = computed(metrics)
  np.testing.assert_allclose(values['cross_entropy'], nats.sum() / 21, rtol=1e-5)
  hits = (logits.argmax(-1) == batch['decoder_target_tokens']) * batch['decoder_loss_weights']
  np.testing.assert_allclose(values['accuracy'], hits.sum() / 21, rtol=1e-5)
  np.testing.assert_allclose(values['commit_loss'], commit / 21, rtol=1e-5)
  np.testing.assert_allclose(
    values['quantization_error/layer_0'],
    commit / aux[0]['quantization_error'].count.sum(),
    rtol=1e-5,
  )
  assert 'bits_per_byte' not in values  # These tokens stand for no known bytes.


def test_dropout_is_for_training_only(setup):
  _, params, batch, _, _ = setup
  model = small_model(residual_dropout_rate=0.5, layer_drop_rate=0.2, **LIGHT)
  loss_fn = jax.jit(model.loss_fn)
  losses = [loss_fn(params, batch, jax.random.key(i))[0] for i in (0, 0, 1)]
  assert losses[0] == losses[1] != losses[2]
  assert_close(loss_fn(params, batch, None)[0], jax.jit(setup[0].eval_fn)(params, batch)[0])


def test_segment_loss_continues_from_the_state(setup):
  model, params, batch, _, _ = setup
  segment_loss = jax.jit(
    lambda params, batch, state: model.segment_loss(params, batch, state, None, 24)
  )
  whole, (end, _) = segment_loss(params, batch, model.init_state(3))
  state, total = model.init_state(3), 0.0
  for start in (0, 4):
    part = {name: x[:, start : start + 4] for name, x in batch.items()}
    loss, (state, _) = segment_loss(params, part, state)
    total += loss
  assert_close(total, whole)
  assert_close(state, end)


def test_score_batch(setup):
  model, params, batch, logits, _ = setup
  chosen = picks(logits, batch['decoder_target_tokens']) * batch['decoder_loss_weights']
  scores, aux = jax.jit(model.score_batch)(params, batch)
  assert_close(scores, chosen.sum(axis=-1).astype(np.float32))
  assert_close(aux, {'num_tokens': batch['decoder_loss_weights'].sum(axis=-1)})
  again, aux = jax.jit(lambda *args: model.score_batch(*args, return_intermediates=True))(
    params, batch
  )
  assert_close(again, scores)
  (codes,) = aux['intermediates']['layers_0']['attention_0']['codes']
  assert codes.shape == (3, 8, 1)
  assert codes.dtype == jnp.int32


def test_scores_come_with_the_bytes_that_they_are_of():
  config = small_config(vocab_size=264, **LIGHT)
  model = TransformerVQModel(Transformer(config), seqio.ByteVocabulary(), optax.sgd(0.1))
  targets = np.array([[3, 40, 258, 1], [1, 261, 99, 0]], np.int32)
  batch = {
    'decoder_input_tokens': np.ones_like(targets),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets > 0).astype(np.float32),
  }
  _, aux = jax.jit(model.score_batch)(random_params(config), batch)
  assert_close(aux, {'num_tokens': np.array([4.0, 3.0]), 'num_bytes': np.array([3.0, 1.0])})


LENGTH = 12
# Around the edges of blocks of 4 and of a window of 3, and a row without anything to generate.
PROMPT_LENGTHS = [0, 1, 3, 4, 5, 7, 8, 11, 12]


@pytest.fixture(scope='module')
def prompts():
  model = small_model(num_layers=1)
  batch = random_batch(model.config, len(PROMPT_LENGTHS), LENGTH)
  targets = np.array(batch['decoder_target_tokens'])
  targets[-1, -3:] = 1
  for row, length in zip(targets, PROMPT_LENGTHS, strict=True):
    row[length:] = 0
  targets[4, 7] = 5  # Beyond the first padding: not a part of the prompt.
  return model, random_params(model.config), {**batch, 'decoder_target_tokens': targets}


def test_greedy_choice_is_the_likeliest_token_of_the_full_forward(prompts):
  model, params, batch = prompts
  tokens, aux = jax.jit(model.predict_batch_with_aux)(params, batch)
  assert tokens.shape == (9, LENGTH)
  assert tokens.dtype == jnp.int32
  assert all(leaf.shape[0] == 9 for leaf in jax.tree.leaves(aux))

  forward = jax.jit(lambda inputs: model.module.apply({'params': params}, inputs)[0])
  start = batch['decoder_input_tokens'][:, :1]
  expected, scores = batch['decoder_target_tokens'].copy(), np.zeros(9)
  for t in range(LENGTH):
    # Causal: what stands at t and after it in the input does not matter.
    logits = forward(jnp.concatenate([start, expected[:, :-1]], axis=1))[:, t]
    choice = np.asarray(logits[:, 1:].argmax(axis=-1)) + 1  # Padding is never chosen.
    for row, length in enumerate(PROMPT_LENGTHS):
      if t >= length:
        expected[row, t] = choice[row]
        scores[row] += log_softmax(logits)[row, choice[row]]
  np.testing.assert_array_equal(tokens, expected)
  assert_close(aux['scores'], scores.astype(np.float32), atol=1e-4)
  np.testing.assert_array_equal(jax.jit(model.predict_batch)(params, batch), tokens)


def test_samples_keep_prompts_and_follow_the_key(prompts):
  model, params, batch = prompts

  @jax.jit
  def predict(key):
    return model.predict_batch_with_aux(params, batch, rng=key, temperature=0.9, top_p=0.9)

  first, again, other = (predict(jax.random.key(i))[0] for i in (0, 0, 1))
  for row, length in enumerate(PROMPT_LENGTHS):
    given = batch['decoder_target_tokens'][row, :length]
    np.testing.assert_array_equal(first[row, :length], given)
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other)
  scores = predict(jax.random.key(0))[1]['scores']
  assert scores[-1] == 0
  assert np.all(scores[:-1] < 0)


def test_ids_that_stand_for_nothing_are_never_chosen():
  """However likely; what is chosen has the likelihood that the model gives it."""
  config = small_config(vocab_size=264, **LIGHT)
  model = TransformerVQModel(Transformer(config), seqio.ByteVocabulary(), optax.sgd(0.1))
  params = random_params(config)
  nothing = np.array([0, 2, *range(259, 264)])
  params['logits']['bias'] = params['logits']['bias'].at[nothing].add(4.0)
  none = np.zeros([40, 30], np.int32)
  prompts = {'decoder_target_tokens': none, 'decoder_input_tokens': none + 1}
  predict = jax.jit(model.predict_batch_with_aux, static_argnames='temperature')
  for rng, temperature in ((None, 1.0), (jax.random.key(0), 1.0), (jax.random.key(0), 1e6)):
    tokens, aux = predict(params, prompts, rng, temperature=temperature)
    assert not np.isin(tokens, nothing).any()
    inputs = np.pad(tokens[:, :-1], [(0, 0), (1, 2)], constant_values=1)
    logits = jax.jit(model.module.apply)({'params': params}, inputs)[0]
    assert_close(aux['scores'], picks(logits[:, :30], tokens).sum(axis=1), rtol=1e-4)


def test_bits_per_byte():
  vocabulary = seqio.ByteVocabulary(extra_ids=4)
  config = small_config(vocab_size=vocabulary.vocab_size, **LIGHT)
  model = TransformerVQModel(Transformer(config), vocabulary, optax.sgd(0.1))
  params, batch = random_params(config), random_batch(config, 2, 8)
  # EOS and an extra id are predicted but stand for no byte; the first and last byte do.
  targets = batch['decoder_target_tokens'].at[0, :4].set(jnp.array([1, 260, 3, 258]))
  batch['decoder_target_tokens'] = targets
  logits = jax.jit(model.module.apply)({'params': params}, batch['decoder_input_tokens'])[0]
  weights = np.asarray(batch['decoder_loss_weights'])
  bits = -(picks(logits, targets) * weights).sum() / np.log(2)
  num_bytes = sum(
    weight for weight, id_ in zip(weights.ravel(), np.ravel(targets), strict=True) if 3 <= id_ < 259
  )
  assert num_bytes < weights.sum()
  metrics = jax.jit(model.eval_fn)(params, batch)[1]
  np.testing.assert_allclose(computed(metrics)['bits_per_byte'], bits / num_bytes, rtol=1e-5)


def test_a_larger_vocabulary_is_refused():
  module = Transformer(small_config())
  with pytest.raises(ConfigError, match=r'TransformerConfig\.vocab_size = 11 .* at least 12'):
    TransformerVQModel(module, seqio.PassThroughVocabulary(12), optax.sgd(0.1))
  # A smaller one leaves ids unused.
  TransformerVQModel(module, seqio.PassThroughVocabulary(10), optax.sgd(0.1))


def test_initial_variables():
  model = small_model()
  init = jax.jit(
    lambda key: model.get_initial_variables(key, {'decoder_input_tokens': (2, 8)})['params']
  )
  params = init(jax.random.key(0))
  quantizer = params['layers']['attention_0']['quantizer']
  np.testing.assert_array_equal(quantizer['c_count'], 1)
  # Layers are drawn apart.
  assert np.abs(quantizer['c_sum'][0] - quantizer['c_sum'][1]).max() > 1e-3
  assert not np.any(params['layers']['attention_0']['content_bias'])
  assert np.any(
    init(jax.random.key(1))['token_embedder']['embedding'] != params['token_embedder']['embedding']
  )


def test_dropout_rngs_are_flax_collections():
  rngs = DropoutRngs(jax.random.key(0), jax.random.key(1))
  assert rngs.collections() == {'dropout': rngs.update, 'sequence_dropout': rngs.sequence}
