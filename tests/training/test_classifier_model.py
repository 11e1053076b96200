"""The classifier's loss, metrics, scores and classes, beside NumPy."""

import jax
import numpy as np
import optax
import pytest
import seqio
from classifier_util import (
  NUM_CLASSES,
  encoder_config,
  random_classifier_params,
  random_examples,
  small_classifier,
)
from util import LIGHT, computed

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data.classification import Format
from tvq_t5x.training.classifier import ClassifierModel
from tvq_t5x.training.train_state import init_train_state
from tvq_t5x.training.train_step import train_on_sequences

BATCH_SIZE, LENGTH = 6, 9


@pytest.fixture(scope='module', params=[False, True], ids=['one', 'pair'])
def evaluated(request):
  model = small_classifier(real=not request.param, pair=request.param, **LIGHT)
  params, batch = random_classifier_params(model.module), random_examples(model, BATCH_SIZE, LENGTH)
  scores, aux = jax.jit(model.score_batch)(params, batch)
  loss, metrics = jax.jit(model.eval_fn)(params, batch)
  return model, batch, np.asarray(scores), jax.tree.map(np.asarray, aux), loss, computed(metrics)


def test_metrics_are_of_the_rows_that_are_examples(evaluated):
  _, batch, scores, aux, _, metrics = evaluated
  label, is_example = np.asarray(batch['label']), np.asarray(batch['label_weights']) > 0
  found = aux['log_probabilities']
  np.testing.assert_allclose(np.sum(np.exp(found), axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(scores, found[np.arange(BATCH_SIZE), label], rtol=1e-6)
  hits = np.argmax(found, axis=1) == label
  assert metrics['accuracy'] == pytest.approx(np.mean(hits[is_example]))
  assert metrics['cross_entropy'] == pytest.approx(-np.mean(scores[is_example]), rel=1e-5)


def test_the_loss_is_a_mean_over_examples_with_that_of_the_sublayers_over_tokens(evaluated):
  model, batch, scores, _, loss, metrics = evaluated
  lengths = [int(np.sum(x)) for name, x in batch.items() if name.startswith('encoder_lengths')]
  commit = model.config.commit_weight * metrics['commit_loss'] * sum(lengths)
  commit /= len(lengths) * LENGTH
  nats = -np.sum(scores * np.asarray(batch['label_weights']))
  assert float(loss) == pytest.approx((nats + commit) / BATCH_SIZE, rel=1e-5)


def test_classes(evaluated):
  model, batch, _, aux, *_ = evaluated
  params = random_classifier_params(model.module)
  classes, more = jax.jit(model.predict_batch_with_aux)(params, batch)
  np.testing.assert_array_equal(classes[:, 0], np.argmax(aux['log_probabilities'], axis=1))
  np.testing.assert_allclose(more['scores'], np.max(aux['log_probabilities'], axis=1), rtol=1e-6)


@pytest.mark.slow
def test_it_learns_labels_and_its_codes_follow_the_keys():
  model = small_classifier(optax.adam(1e-2), ema_decay=0.5, **LIGHT)
  batch = random_examples(model, BATCH_SIZE, LENGTH)
  step = jax.jit(lambda state: train_on_sequences(model, state, batch, jax.random.key(1), LENGTH))
  state = init_train_state(model, jax.random.key(0))
  before, losses = state.params, []
  for _ in range(30):
    state, metrics = step(state)
    losses.append(computed(jax.tree.map(lambda x: x[0], metrics))['cross_entropy'])
  assert int(state.step) == 30
  assert losses[-1] < 0.3 * losses[0]
  counts = state.params['layers_0']['attention_0']['quantizer']['c_count']
  # Each step halves the weight of what was there, and adds the keys of tokens: no padding.
  num_tokens = float(np.sum(batch['encoder_lengths']))
  np.testing.assert_allclose(np.sum(counts, axis=-1), num_tokens, rtol=1e-3)
  assert not np.allclose(before['head']['kernel'], state.params['head']['kernel'])


def test_a_vocabulary_of_more_ids_than_the_network_has_is_refused():
  with pytest.raises(ConfigError, match='vocab_size = 11 .* at least 12'):
    task = Format(seqio.PassThroughVocabulary(12), NUM_CLASSES, False)
    ClassifierModel(encoder_config(), task, optax.sgd(0.1))
