"""Updates against NumPy, and which parameters they leave alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from util import HEADS, assert_close, random_params, small_config

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.training import optimizers

NOT_DECAYED = {'scale', 'bias', 'content_bias', 'position_bias'}


def name_of(path):
  return path[-1].key


@pytest.mark.quick
def test_warmup_cosine():
  schedule = optimizers.warmup_cosine(4e-4, 100, 1100)
  expected = {0: 0.0, 25: 1e-4, 100: 4e-4, 600: 2.2e-4, 1100: 4e-5, 5000: 4e-5}
  # A quarter of the cosine.
  expected[350] = 4e-5 + 3.6e-4 * (1 + np.cos(np.pi / 4)) / 2
  for step, value in expected.items():
    np.testing.assert_allclose(schedule(step), value, rtol=1e-5)
  without_warmup = optimizers.warmup_cosine(1.0, 0, 10, final_share=0.5)
  np.testing.assert_allclose([without_warmup(i) for i in (0, 5, 10)], [1, 0.75, 0.5], rtol=1e-6)


@pytest.mark.quick
def test_warmup_linear():
  schedule = optimizers.warmup_linear(4e-4, 100, 1100)
  for step, value in {0: 0.0, 25: 1e-4, 100: 4e-4, 600: 2e-4, 1100: 0.0, 5000: 0.0}.items():
    np.testing.assert_allclose(schedule(step), value, rtol=1e-5)
  without_warmup = optimizers.warmup_linear(1.0, 0, 10)
  np.testing.assert_allclose([without_warmup(i) for i in (0, 5, 10)], [1, 0.5, 0], rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize('schedule', [optimizers.warmup_cosine, optimizers.warmup_linear])
@pytest.mark.parametrize(('warmup', 'total'), [(10, 10), (-1, 10)])
def test_warmup_must_end_first(schedule, warmup, total):
  words = rf'{schedule.__name__}.warmup_steps = {warmup} .* 0 to .*total_steps - 1 = 9'
  with pytest.raises(ConfigError, match=words):
    schedule(1.0, warmup, total)


@pytest.mark.quick
@pytest.mark.parametrize('rate', [-1.0, math.inf, math.nan])
def test_rates_are_finite_and_not_negative(rate):
  for name in ('adamw', 'lion', 'adafactor'):
    with pytest.raises(ConfigError, match=f'{name}.learning_rate = .* at least 0'):
      getattr(optimizers, name)(rate)
  for schedule in (optimizers.warmup_cosine, optimizers.warmup_linear):
    with pytest.raises(ConfigError, match=f'{schedule.__name__}.peak = .* at least 0'):
      schedule(rate, 1, 2)


@pytest.mark.quick
def test_a_decay_that_follows_the_rate():
  """It is optax's AdamW, but for the dynamics of state-space layers and one-dimensional arrays."""
  params = {'kernel': jnp.ones(3), 'log_dt': jnp.ones(3), 'bias': jnp.ones(3)}
  schedule = optimizers.warmup_linear(1e-3, 2, 10)
  ours = optimizers.adamw(schedule, weight_decay=0.25, decay_follows_rate=True)
  decayed = {'kernel': True, 'log_dt': False, 'bias': False}
  theirs = optax.adamw(schedule, 0.9, 0.98, 1e-9, weight_decay=0.25, mask=decayed)
  states = ours.init(params), theirs.init(params)
  for step in range(4):
    gradients = random_like(params, step)
    updates, expected = (
      optimizer.update(gradients, state, params)
      for optimizer, state in zip((ours, theirs), states, strict=True)
    )
    assert_close(updates[0], expected[0])
    states = updates[1], expected[1]


def random_like(params, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)


@pytest.mark.quick
def test_adamw_step_equals_numpy():
  config = small_config(head_type='mha', num_heads=2, final_norm=True)
  params = random_params(config)
  optimizer = optimizers.with_codebook_ema(
    optimizers.adamw(
      optimizers.warmup_cosine(1e-2, 2, 10), weight_decay=1e-3, clip_norm=0.5, eps=1e-9
    ),
    decay=0.9,
  )
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  moments = jax.tree.map(lambda x: (np.zeros(x.shape), np.zeros(x.shape)), params)
  expected = jax.tree.map(np.asarray, params)
  for step, learning_rate in enumerate([0.0, 5e-3, 1e-2]):
    gradients = random_like(params, step)
    updates, state = update(gradients, state, params)
    params = optax.apply_updates(params, updates)
    # The clipping sees the codebooks' gradients no more than the decay does.
    main = [
      np.square(g).sum()
      for path, g in jax.tree_util.tree_leaves_with_path(gradients)
      if not name_of(path).startswith('c_')
    ]
    shrink = min(1.0, 0.5 / np.sqrt(sum(main)))

    def one(path, p, g, moment, step=step, learning_rate=learning_rate, shrink=shrink):
      g = np.asarray(g)
      if name_of(path) in ('c_sum', 'c_count'):
        return 0.9 * p + 0.1 * -g
      m, v = moment
      m[...] = 0.9 * m + 0.1 * shrink * g
      v[...] = 0.98 * v + 0.02 * (shrink * g) ** 2
      adam = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.98 ** (step + 1))) + 1e-9)
      # Not scaled by the learning rate: at the first step it is all there is.
      decay = 0.0 if name_of(path) in NOT_DECAYED else 1e-3
      return p - learning_rate * adam - decay * p

    expected = jax.tree_util.tree_map_with_path(one, expected, gradients, moments)
    assert_close(params, jax.tree.map(np.float32, expected))


@pytest.mark.parametrize(
  ('heads', 'scan_layers'),
  [(HEADS['gated_multi'], True), (HEADS['mqa'], False)],
  ids=['gated_scanned', 'mqa_unscanned'],
)
@pytest.mark.parametrize('factory', [optimizers.adamw, optimizers.lion, optimizers.adafactor])
def test_only_weights_decay(factory, heads, scan_layers):
  config = small_config(scan_layers=scan_layers, final_norm=True, absolute_positions=True, **heads)
  params = random_params(config)
  optimizer = optimizers.with_codebook_ema(factory(0.0, weight_decay=0.25), decay=0.5)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
  decayed = set()
  for (path, update), p in zip(
    jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True
  ):
    if name_of(path) in ('c_sum', 'c_count'):
      assert_close(update, -0.5 * p)  # No keys: the averages fade.
    elif name_of(path) in NOT_DECAYED:
      np.testing.assert_array_equal(update, 0)
    else:
      assert_close(update, -0.25 * p)
      decayed.add(name_of(path))
  assert decayed == {'embedding', 'kernel', 'position_scale'}


@pytest.mark.quick
@pytest.mark.parametrize('rate', [1e-4, 1e-2])
@pytest.mark.parametrize('schedule', [optax.constant_schedule, float])
def test_the_dynamics_of_state_space_layers_learn_slowly_and_do_not_decay(rate, schedule):
  params = {
    'ssm': {name: jnp.ones(3) for name in ('log_dt', 'b_im', 'c_re')},
    'kernel': jnp.ones(3),
  }
  gradients = jax.tree.map(lambda x: 2 * x, params)
  optimizer = optimizers.lion(schedule(rate), weight_decay=0.25)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  slow = min(rate, 1e-3)
  for name in ('log_dt', 'b_im'):
    assert_close(updates['ssm'][name], jnp.full(3, -slow))
  for found in (updates['ssm']['c_re'], updates['kernel']):
    assert_close(found, jnp.full(3, -rate - 0.25))


@pytest.mark.quick
def test_codebook_ema():
  params = {'c_sum': jnp.asarray([1.0, 2.0]), 'c_count': jnp.asarray([3.0])}
  statistics = {'c_sum': jnp.asarray([5.0, -4.0]), 'c_count': jnp.asarray([0.0])}
  transformation = optimizers.codebook_ema(0.99)
  gradients = jax.tree.map(jnp.negative, statistics)
  updates, _ = transformation.update(gradients, transformation.init(params), params)
  new = optax.apply_updates(params, updates)
  assert_close(new, jax.tree.map(lambda p, s: 0.99 * p + 0.01 * s, params, statistics))


@pytest.mark.quick
def test_codebook_labels():
  labels = optimizers.codebook_labels(random_params(small_config()))
  assert labels['layers']['attention_1'].pop('quantizer') == {
    'c_sum': 'codebook',
    'c_count': 'codebook',
  }
  assert set(jax.tree.leaves(labels['layers']['attention_1'])) == {'main'}


@pytest.mark.quick
def test_codebook_gradients_do_not_clip_the_rest():
  params = {'kernel': jnp.ones([2, 2]), 'quantizer': {'c_sum': jnp.ones([3])}}
  inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
  optimizer = optimizers.with_codebook_ema(inner, 0.99)
  gradients = {'kernel': jnp.full([2, 2], 0.1), 'quantizer': {'c_sum': jnp.full([3], 1e6)}}
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  assert_close(updates['kernel'], -gradients['kernel'])


@pytest.mark.parametrize('width', [8, 128])
def test_adafactor_does_not_see_that_layers_are_stacked(width):
  """Factored from 128 on, and whatever the other layers' scales and gradients are."""
  rng = np.random.default_rng(0)
  layers = {
    f'layers_{i}': {
      'kernel': jnp.asarray(scale * rng.normal(size=(width, width)), jnp.float32),
      'bias': jnp.asarray(scale * rng.normal(size=width), jnp.float32),
    }
    for i, scale in enumerate([1.0, 30.0])
  }
  stacked = {'layers': jax.tree.map(lambda *x: jnp.stack(x), *layers.values())}
  optimizer = optimizers.adafactor(0.01, weight_decay=1e-3)

  def run(params):
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(3):
      # Gradients that differ between layers, and by more than the update clipping.
      def gradient(x, step=step):
        return jnp.sin(x * (step + 1)) * jnp.abs(x) ** 2

      updates, state = update(jax.tree.map(gradient, params), state, params)
      params = optax.apply_updates(params, updates)
    return params, updates

  (ours, updates), (expected, _) = run(stacked), run(layers)
  expected = {'layers': jax.tree.map(lambda *x: jnp.stack(x), *expected.values())}
  assert_close(ours, expected)
  # The update is relative to the parameter's size.
  kernel, update = (np.asarray(x['layers']['kernel']) for x in (ours, updates))
  relative = np.sqrt(np.square(update).mean((1, 2)) / np.square(kernel).mean((1, 2)))
  assert np.all(relative < 0.02)
  assert np.all(relative > 0.002)


@pytest.mark.quick
def test_lion_step_is_the_sign():
  params = {'kernel': jnp.asarray([[1.0, -2.0], [3.0, 4.0]])}
  gradients = {'kernel': jnp.asarray([[0.1, -5.0], [1e-3, 7.0]])}
  optimizer = optimizers.lion(0.1, weight_decay=0.01)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  expected = -0.1 * jnp.sign(gradients['kernel']) - 0.01 * params['kernel']
  assert_close(updates['kernel'], expected)
