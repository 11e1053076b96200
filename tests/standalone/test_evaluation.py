"""Evaluation counts every token once, whatever the batch size and the segments."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import seqio
import tiny_task
from util import small_config

from tvq_t5x.data import datasets, streaming
from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.standalone.evaluation import Evaluator, Sums
from tvq_t5x.training import metrics, placement
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.partitioning import Partitioner
from tvq_t5x.training.train_state import init_train_state

_LENGTH = 32
_EXACT = {'rtol': 2e-6, 'atol': 0}


def _cfg(batch_size):
  return datasets.DatasetConfig(
    mixture_or_task_name='tiny_bytes',
    task_feature_lengths={'targets': _LENGTH},
    split='test',
    batch_size=batch_size,
    shuffle=False,
    seed=None,
  )


@pytest.fixture(scope='module')
def model():
  config = small_config(vocab_size=264, block_len=4, window_len=6)
  return TransformerVQModel(Transformer(config), seqio.ByteVocabulary(), optax.sgd(0.1))


@pytest.fixture(scope='module')
def params(model):
  return init_train_state(model, jax.random.key(0)).params


def _evaluator(model, segment_len, devices=1, carry_for=None):
  partitioner = Partitioner(devices=jax.devices()[:devices])
  shardings = placement.train_state_shardings(partitioner, model).params
  if carry_for:
    partitioner = partitioner.for_batch(carry_for)
  return Evaluator(model, partitioner, shardings, segment_len, carry_state=bool(carry_for))


def _evaluate(model, params, batch_size, segment_len, devices=1):
  evaluator = _evaluator(model, segment_len, devices)
  batches = datasets.evaluation_batches(_cfg(batch_size), model.FEATURE_CONVERTER_CLS)
  return evaluator(params, batches)


@pytest.fixture(scope='module')
def expected(model, params):
  """Sums by NumPy over every token of the split, from one forward pass of whole sequences."""
  (batch,) = datasets.evaluation_batches(_cfg(16), model.FEATURE_CONVERTER_CLS)
  inputs, targets = batch['decoder_input_tokens'], batch['decoder_target_tokens']
  logits = np.asarray(model.module.apply({'params': params}, inputs)[0], np.float64)
  highest = logits.max(-1, keepdims=True)
  log_sum = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
  nats = log_sum - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  real = targets > 0
  size = tiny_task.SIZES['test']
  assert real.sum() == size + 1  # And the end of the document.
  return {
    'cross_entropy': nats[real].sum() / (size + 1),
    'bits_per_byte': nats[real].sum() / np.log(2) / size,
    'accuracy': (logits.argmax(-1) == targets)[real].mean(),
  }


@pytest.mark.parametrize(('batch_size', 'segment_len'), [(1, 32), (3, 16), (8, 8)])
def test_equals_the_sum_over_tokens(model, params, expected, batch_size, segment_len):
  found = _evaluate(model, params, batch_size, segment_len)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, **_EXACT, err_msg=name)


def test_sums_of_quantizers_do_not_depend_on_the_batch(model, params):
  one, many = _evaluate(model, params, 1, 32), _evaluate(model, params, 8, 16)
  assert one.keys() == many.keys()
  of_layers = {'quantization_error', 'codebook_perplexity', 'codebook_dead_codes'}
  assert {'commit_loss', *(f'{name}/layer_1_0' for name in of_layers)} <= one.keys()
  for name, value in one.items():
    np.testing.assert_allclose(many[name], value, rtol=1e-5, err_msg=name)


def test_devices_change_nothing(model, params, expected):
  found = _evaluate(model, params, 8, 16, devices=4)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, **_EXACT, err_msg=name)


def _stretches(batch_size, length=_LENGTH):
  cfg = dataclasses.replace(_cfg(batch_size), task_feature_lengths={'targets': length})
  return list(streaming.evaluation_batches(cfg, TransformerVQFeatureConverter))


@pytest.mark.parametrize(('batch_size', 'length'), [(1, 32), (3, 8), (7, 24), (500, 8)])
def test_stretches_lie_end_to_end(batch_size, length):
  batches = _stretches(batch_size, length)
  whole = {name: np.concatenate([b[name] for b in batches], axis=1) for name in batches[0]}
  weights = whole['decoder_loss_weights']
  # Padding comes at the ends of rows only.
  assert (np.diff(weights, axis=1) <= 0).all()
  expected = np.frombuffer(tiny_task.text('test') + b'\xfe', np.uint8) + 3
  expected[-1] = 1
  np.testing.assert_array_equal(whole['decoder_target_tokens'][weights > 0], expected)
  for inputs, targets, real in zip(
    whole['decoder_input_tokens'], whole['decoder_target_tokens'], weights, strict=True
  ):
    size = int(real.sum())
    np.testing.assert_array_equal(inputs[:size], [1, *targets][:size])


@pytest.fixture(scope='module')
def expected_of_one_text(model, params):
  """The split as one sequence, in one forward pass."""
  (batch,) = _stretches(1, 504)
  logits = model.module.apply({'params': params}, batch['decoder_input_tokens'])[0]
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch['decoder_target_tokens'])
  return float((nats * batch['decoder_loss_weights']).sum() / (tiny_task.SIZES['test'] + 1))


@pytest.mark.parametrize(('length', 'segment_len', 'devices'), [(32, 32, 1), (64, 16, 4)])
def test_carried_state_makes_one_text_of_the_split(
  model, params, expected, expected_of_one_text, length, segment_len, devices
):
  evaluator = _evaluator(model, segment_len, devices, carry_for=1)
  sums = evaluator.sums(params, _stretches(1, length))
  assert sums.count('cross_entropy') == tiny_task.SIZES['test'] + 1
  assert sums.count('bits_per_byte') == tiny_task.SIZES['test']
  found = sums.ratios()['cross_entropy']
  np.testing.assert_allclose(found, expected_of_one_text, rtol=1e-5)
  assert (
    abs(found - expected['cross_entropy']) > 1e-3
  )  # Each sequence for itself is another number.


def test_devices_that_share_stretches_change_nothing(model, params):
  one, many = (
    _evaluator(model, 16, devices, carry_for=8)(params, _stretches(8, 16)) for devices in (1, 4)
  )
  for name, value in one.items():
    np.testing.assert_allclose(many[name], value, rtol=1e-5, err_msg=name)


def test_a_stop_ends_it_without_a_result(model, params):
  evaluator = _evaluator(model, 32)
  batches = datasets.evaluation_batches(_cfg(8), model.FEATURE_CONVERTER_CLS)
  asked = []
  assert evaluator(params, batches, lambda: asked.append(1) or len(asked) > 1) is None
  assert len(asked) == 2


def test_training_memory_holds_evaluation_of_long_sequences(model, params):
  """A segment at a time: whole sequences of eight times the length need about as much."""

  def peak(length, segment_len):
    evaluator = _evaluator(model, segment_len)
    batch = {
      name: jax.ShapeDtypeStruct((8, length), dtype)
      for name, dtype in (
        ('decoder_input_tokens', np.int32),
        ('decoder_target_tokens', np.int32),
        ('decoder_loss_weights', np.float32),
      )
    }
    return evaluator._step.lower(params, None, batch).compile().memory_analysis().temp_size_in_bytes

  short = peak(64, 64)
  assert peak(512, 64) < 1.5 * short
  assert peak(512, 512) > 4 * short


def test_sums_are_restored_from_json():
  sums = Sums()
  sums.add({'a': metrics.average(1.0, 3.0), 'b': metrics.average(0.1, 0.0)})
  restored = Sums(sums.to_json())
  restored.add({'a': metrics.average(2.0, 1.0)})
  assert restored.ratios()['a'] == 0.75
  assert np.isnan(restored.ratios()['b'])
