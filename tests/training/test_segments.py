"""A sequence in segments has the numbers of the whole at once, in the memory of a segment."""

import functools

import jax
import jax.numpy as jnp
import pytest
from util import LIGHT, assert_close, random_batch, random_params, small_model

from tvq_t5x.training import optimizers
from tvq_t5x.training.base_model import DropoutRngs
from tvq_t5x.training.segments import sequence_loss
from tvq_t5x.training.train_state import TrainState
from tvq_t5x.training.train_step import train_on_sequences

SEQUENCES, LENGTH = 3, 24
DROPOUT = {'sinusoid_dropout_rate': 0.1, 'residual_dropout_rate': 0.2, 'layer_drop_rate': 0.2}
KINDS = {
  'scanned mqa': {'head_type': 'mqa', 'num_heads': 3, **DROPOUT},
  'no gradient': {**LIGHT, 'grad_through_cache': False, 'absolute_positions': True},
  'mixed': {
    'num_layers': 1,
    'scan_layers': False,
    'sublayers': ('longvq', 'quadratic', 'vq'),
    'kv_cache_len': LENGTH + 8,
    **DROPOUT,
  },
}


@functools.cache
def model_of(kind):
  return small_model(**KINDS[kind])


@functools.cache
def loss_and_gradients(kind, segment_len):
  """Of parameters and of the state before the sequences."""
  model = model_of(kind)
  batch = random_batch(model.config, SEQUENCES, LENGTH)
  params = random_params(model.config)
  _, before, _ = model.module.apply({'params': params}, batch['decoder_input_tokens'][:, :8])
  rngs = DropoutRngs(jax.random.key(1), jax.random.key(2))
  position, layers = before

  def loss(params, layers):
    state = before._replace(position=position, layers=layers)
    ids = jnp.array([5, 0, 2])
    found, (state, metrics) = sequence_loss(
      model, params, batch, state, rngs, 10.0, ids, segment_len=segment_len
    )
    # What follows depends on the state after the sequences, too.
    later = sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(state.layers) if x.dtype.kind == 'f')
    return found + 0.01 * later, (state, metrics)

  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True))(params, layers)


def of_values(gradients):
  """Without those of what is counted: integers, and how often a code was used."""
  leaves = jax.tree_util.tree_leaves_with_path(gradients)
  return [x for path, x in leaves if x.dtype.kind == 'f' and 'counts' not in str(path[-1])]


@pytest.mark.parametrize('segment_len', [pytest.param(4, marks=pytest.mark.slow), 12])
@pytest.mark.parametrize(
  'kind',
  ['scanned mqa', *(pytest.param(x, marks=pytest.mark.slow) for x in ('no gradient', 'mixed'))],
)
def test_values_and_gradients_are_those_of_the_whole(kind, segment_len):
  (loss, (state, metrics)), gradients = loss_and_gradients(kind, segment_len)
  (expected, (expected_state, expected_metrics)), expected_gradients = loss_and_gradients(
    kind, None
  )
  assert_close(loss, expected)
  assert_close(state, expected_state)
  if kind == 'no gradient':  # Then a state passes none either, past the first segment.
    gradients, expected_gradients = gradients[0], expected_gradients[0]
  assert_close(of_values(gradients), of_values(expected_gradients))
  values, expected_values = (
    {name: x.total / x.count for name, x in found.items()} for found in (metrics, expected_metrics)
  )
  assert_close(values, expected_values)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [{}, {'scan_layers': True, 'unroll_layers': True}])
def test_updates_are_those_of_the_whole(fields):
  """With microbatches, several updates a sequence, and a state from the batch before."""
  model = small_model(optimizers.adamw(1e-2, eps=1e-3), **{**LIGHT, **DROPOUT, **fields})
  batch = random_batch(model.config, 4, LENGTH)
  params = random_params(model.config)
  carried = model.init_state(4)
  state = TrainState(jnp.int32(7), params, model.optimizer.init(params), carried)

  def train(segment_len, num_microbatches):
    step = functools.partial(
      train_on_sequences, model, update_len=12, segment_len=segment_len,
      num_microbatches=num_microbatches, rng=jax.random.key(0),
    )  # fmt: skip
    return jax.jit(step)(state, batch)

  expected, found = train(None, 1), train(4, 2)
  assert_close(found[0], expected[0])
  assert_close(found[1]['loss'].total, expected[1]['loss'].total)


def test_memory_is_that_of_a_segment():
  def temporaries(length, segment_len):
    model = model_of('no gradient')
    batch = random_batch(model.config, 1, length)
    loss = functools.partial(sequence_loss, model, segment_len=segment_len)
    gradient = jax.grad(loss, has_aux=True)
    args = random_params(model.config), batch, None, None, 1.0
    return jax.jit(gradient).lower(*args).compile().memory_analysis().temp_size_in_bytes

  # Of 8 times the length, what remains is the states between segments.
  whole, parts = temporaries(2048, None), temporaries(2048, 256)
  assert parts < 0.4 * whole
  assert parts < 2 * temporaries(256, None)
