"""Updates do not depend on microbatches, and carry the state along a sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import seqio
from util import LIGHT, assert_close, random_batch, random_params, small_config, small_model

from tvq_t5x.network.transformer import Transformer
from tvq_t5x.training import optimizers, train_state, train_step
from tvq_t5x.training.models import DropoutRngs, TransformerVQModel
from tvq_t5x.training.train_state import TrainState
from tvq_t5x.training.train_step import train_on_sequences

SEQUENCES, LENGTH, UPDATE_LEN = 4, 16, 8
DROPOUT = {'sinusoid_dropout_rate': 0.1, 'residual_dropout_rate': 0.2, 'layer_drop_rate': 0.2}


def make(**overrides):
  optimizer = optimizers.adamw(1e-2, weight_decay=1e-3, clip_norm=1.0, eps=1e-3)
  model = small_model(optimizer, **{**LIGHT, **overrides})
  params = random_params(model.config)
  state = TrainState(jnp.int32(7), params, model.optimizer.init(params))
  return model, state, random_batch(model.config, SEQUENCES, LENGTH)


@functools.cache
def compiled(model, update_len, num_microbatches):
  return jax.jit(
    lambda state, batch: train_on_sequences(
      model, state, batch, jax.random.key(0), update_len, num_microbatches
    )
  )


def train(model, state, batch, update_len, num_microbatches=1):
  return compiled(model, update_len, num_microbatches)(state, batch)


def values(metrics):
  """Each update's value of each metric."""
  return {name: metric.total / metric.count for name, metric in metrics.items()}


@pytest.fixture(scope='module')
def with_dropout():
  return make(**DROPOUT)


@pytest.fixture(scope='module')
def expected(with_dropout):
  return train(*with_dropout, UPDATE_LEN)


@pytest.mark.parametrize('num_microbatches', [2, 4])
def test_microbatches_change_no_number(with_dropout, expected, num_microbatches):
  state, metrics = train(*with_dropout, UPDATE_LEN, num_microbatches)
  assert_close(state, expected[0])
  assert_close(values(metrics), values(expected[1]))


def test_step_counts_updates_and_metrics_are_of_each(with_dropout, expected):
  state, metrics = expected
  assert state.step == 7 + LENGTH // UPDATE_LEN
  assert state.step.dtype == jnp.int32
  assert all(leaf.shape == (2,) for leaf in jax.tree.leaves(metrics))
  # Metrics of both updates merge into those of the batch; 3 positions are padding.
  assert metrics['cross_entropy'].count.sum() == SEQUENCES * LENGTH - 3
  total = metrics['cross_entropy'].reduce()
  np.testing.assert_allclose(
    total.compute(), metrics['cross_entropy'].total.sum() / (SEQUENCES * LENGTH - 3), rtol=1e-6
  )
  # Everything is trained.
  model, before, _ = with_dropout
  changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, before.params)
  assert all(jax.tree.leaves(changed))


def test_the_loss_is_a_token_as_the_cross_entropy_is(with_dropout, expected):
  """Padding is in neither, or the loss would be the smaller one where there is some."""
  model, _, batch = with_dropout
  assert np.any(batch['decoder_loss_weights'] == 0)
  found = values(expected[1])
  losses = found['cross_entropy'] + model.config.commit_weight * found['commit_loss']
  assert_close(found['loss'], losses)


def test_masks_change_with_the_step(with_dropout, expected):
  model, state, batch = with_dropout
  later = train(model, state._replace(step=state.step + 1), batch, UPDATE_LEN)[1]
  assert np.all(values(later)['loss'] != values(expected[1])['loss'])


def by_hand(model, state, batch, update_len, carry):
  """The updates one after the other, from the loss of each segment."""
  size = SEQUENCES * update_len

  @jax.jit
  def update(params, opt_state, segment, decoder_state):
    loss_fn = jax.value_and_grad(model.segment_loss, has_aux=True)
    (loss, (decoder_state, _)), gradients = loss_fn(params, segment, decoder_state, None, size)
    updates, opt_state = model.optimizer.update(gradients, opt_state, params)
    return loss, jax.tree.map(jnp.add, params, updates), opt_state, decoder_state

  _, params, opt_state, _ = state
  decoder_state, losses = model.init_state(SEQUENCES), []
  for start in range(0, LENGTH, update_len):
    segment = {name: x[:, start : start + update_len] for name, x in batch.items()}
    if not carry:
      decoder_state = model.init_state(SEQUENCES)
    loss, params, opt_state, decoder_state = update(params, opt_state, segment, decoder_state)
    losses.append(loss)
  return params, jnp.stack(losses)


@pytest.mark.parametrize('update_len', [4, pytest.param(8, marks=pytest.mark.slow)])
def test_state_is_carried_along_the_sequence(update_len):
  model, state, batch = make()
  new_state, metrics = train(model, state, batch, update_len)
  params, losses = by_hand(model, state, batch, update_len, carry=True)
  assert_close(new_state.params, params)
  assert_close(metrics['loss'].total / (SEQUENCES * update_len), losses)

  _, forgetful = by_hand(model, state, batch, update_len, carry=False)
  assert_close(losses[0], forgetful[0])
  assert np.all(np.abs(losses[1:] - forgetful[1:]) > 1e-4)


SCANNED = {'scan_layers': True, 'num_layers': 2}


@pytest.mark.slow
def test_unrolled_layers_change_no_number():
  expected, theirs = train(*make(**DROPOUT, **SCANNED), UPDATE_LEN)
  found, metrics = train(*make(**DROPOUT, **SCANNED, unroll_layers=True), UPDATE_LEN, 2)
  assert_close(found, expected)
  assert_close(values(metrics), values(theirs))


@pytest.mark.parametrize('unroll_layers', [False, True])
def test_the_loop_over_updates_carries_no_stack_of_states_of_unrolled_layers(unroll_layers):
  model, state, batch = make(**SCANNED, unroll_layers=unroll_layers)
  step = functools.partial(train_on_sequences, model, update_len=UPDATE_LEN)
  program = jax.make_jaxpr(lambda *args: step(*args, jax.random.key(0)))(state, batch)
  loop = next(x for x in reversed(program.eqns) if x.primitive.name == 'scan')
  stack = 1, model.config.num_layers, SEQUENCES
  assert any(x.aval.shape[:3] == stack for x in loop.outvars) != unroll_layers


@pytest.mark.parametrize(
  ('scan_layers', 'num_microbatches'),
  [
    (False, 1),
    (True, 2),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in ((False, 2), (True, 1))),
  ],
)
def test_state_is_carried_to_the_next_batch(scan_layers, num_microbatches):
  """Two batches are one of twice the length, but for the rows that begin with EOS."""
  config = small_config(**{**LIGHT, 'scan_layers': scan_layers})
  optimizer = optimizers.adamw(1e-2, weight_decay=1e-3, clip_norm=1.0, eps=1e-3)
  vocabulary = seqio.PassThroughVocabulary(config.vocab_size)
  model = TransformerVQModel(Transformer(config), vocabulary, optimizer, carry_state=True)
  params = random_params(config)
  state = TrainState(
    jnp.int32(7), params, model.optimizer.init(params), model.init_state(SEQUENCES)
  )
  batch = random_batch(config, SEQUENCES, LENGTH)
  batch = {name: x.at[:, 8].set(5) for name, x in batch.items() if 'weights' not in name} | {
    'decoder_loss_weights': batch['decoder_loss_weights']
  }
  first, second = ({name: x[:, i : i + 8] for name, x in batch.items()} for i in (0, 8))
  whole, metrics = train(model, state, batch, UPDATE_LEN, num_microbatches)
  half, _ = train(model, state, first, UPDATE_LEN, num_microbatches)
  found, found_metrics = train(model, half, second, UPDATE_LEN, num_microbatches)
  assert_close(found, whole)
  assert_close(found_metrics['loss'].total, metrics['loss'].total[1:])

  # A row that begins with EOS has nothing of what came before.
  begins = {**second, 'decoder_input_tokens': second['decoder_input_tokens'].at[1, 0].set(1)}
  anew, _ = train(model, half, begins, UPDATE_LEN, num_microbatches)
  np.testing.assert_array_equal(anew.carried.position, [16, 8, 16, 16])
  alone = half._replace(carried=model.init_state(SEQUENCES))
  expected, _ = train(model, alone, begins, UPDATE_LEN, num_microbatches)
  axis = 1 if scan_layers else 0
  for x, y in zip(*map(jax.tree.leaves, (anew.carried, expected.carried)), strict=True):
    axis = min(axis, x.ndim - 1)
    assert_close(jnp.take(x, 1, axis), jnp.take(y, 1, axis))


def test_a_cache_of_a_sequence_makes_segments_of_the_quadratic_baseline_a_whole():
  fields = {'attention_type': 'quadratic', 'kv_cache_len': LENGTH}
  model, state, batch = make(**fields)
  frozen = TransformerVQModel(model.module, model.output_vocabulary, optax.sgd(0.0))
  state = state._replace(opt_state=frozen.optimizer.init(state.params))
  _, whole = train(frozen, state, batch, LENGTH)
  after, parts = train(frozen, state, batch, UPDATE_LEN, 2)
  assert after.step == state.step + LENGTH // UPDATE_LEN
  of_parts, of_whole = (x['cross_entropy'] for x in (parts, whole))
  assert_close(of_parts.total.sum() / of_parts.count.sum(), values(whole)['cross_entropy'][0])


def test_gradients_are_of_the_mean_over_positions():
  """Summed over microbatches; the codebooks' are minus the whole batch's statistics."""
  model, state, batch = make()
  rngs = DropoutRngs(jax.random.key(0), jax.random.key(1))

  @jax.jit
  def gradients_of(params):
    def loss(params):
      return model.segment_loss(params, batch, None, rngs, SEQUENCES * LENGTH)[0]

    parts = jax.tree.map(lambda x: x.reshape(2, 2, LENGTH), batch)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), model.init_state(2))
    ids = jnp.arange(SEQUENCES).reshape(2, 2)
    ours = train_step.accumulate_gradients(model, params, parts, states, ids, rngs)
    return ours, jax.grad(loss)(params)

  (gradients, metrics, states), expected = gradients_of(state.params)
  assert_close(gradients, expected)
  counts = gradients['layers_0']['attention_0']['quantizer']['c_count']
  assert counts.sum() == -(SEQUENCES * LENGTH - 3)
  assert states.position.shape == (2, 2)
  main = optimizers.codebook_labels(gradients)
  squares = jax.tree.map(lambda g, label: jnp.sum(g**2) * (label == 'main'), gradients, main)
  norm = np.sqrt(sum(jax.tree.leaves(squares)))
  np.testing.assert_allclose(metrics['gradient_norm'].total, norm, rtol=1e-5)


def test_initial_train_state():
  model = small_model(**LIGHT)
  state = jax.jit(lambda key: train_state.init_train_state(model, key))(jax.random.key(0))
  assert state.step == 0
  assert jax.tree.structure(state.params) == jax.tree.structure(random_params(model.config))
