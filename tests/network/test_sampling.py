import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network.sampling import FILTERED, SamplingConfig, choose, nucleus_filter, top_k_filter

pytestmark = pytest.mark.quick

PROBABILITIES = [0.5, 0.2, 0.2, 0.07, 0.03]
LOGITS = jnp.log(jnp.asarray([PROBABILITIES, PROBABILITIES[::-1]])) + 3.0


def likeliest(logits, k):
  """The likeliest k tokens of a row, lower ids first."""
  order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
  return np.isin(np.arange(len(logits)), order[:k])


def nucleus(logits, probabilities, top_p):
  """Tokens of a row of which all likelier ones hold less than a share."""
  likelier = logits[None, :] > logits[:, None]
  return likelier @ np.asarray(probabilities) < top_p


@pytest.mark.parametrize('top_p', [0.00001, 0.01, 0.45, 0.6, 0.75, 0.85, 0.95, 0.99, 1.0])
def test_nucleus(top_p):
  ours = nucleus_filter(LOGITS, top_p)
  assert np.sum(ours[0] > FILTERED) == sum(top_p > x for x in (0, 0.5, 0.5, 0.9, 0.97))
  for row, logits in zip(ours, LOGITS, strict=True):
    kept = nucleus(logits, jax.nn.softmax(logits), top_p)
    np.testing.assert_array_equal(row, np.where(kept, logits, FILTERED))


# Few and round numbers, so that many are equal, a zero with a sign among them.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
  st.lists(
    st.sampled_from([-1e9, -2.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 3.0, 80.0]), min_size=9, max_size=9
  ),
  st.integers(1, 12),
)
def test_top_k_and_nucleus_of_equal_logits(logits, k):
  logits = np.asarray(logits, np.float32)
  kept = likeliest(logits, k)
  np.testing.assert_array_equal(_top_k(logits, k), np.where(kept, logits, FILTERED))
  # Far from a share that any of the tokens reaches.
  top_p = (k - 0.5) / 12 + 1e-4
  p = np.asarray(jax.nn.softmax(logits.astype(np.float64)))
  before = np.cumsum(np.sort(p)[::-1])
  if np.abs(before - top_p).min() > 1e-3:
    kept = nucleus(logits, p, top_p)
    np.testing.assert_array_equal(_nucleus(logits, top_p), np.where(kept, logits, FILTERED))


_top_k, _nucleus = jax.jit(top_k_filter), jax.jit(nucleus_filter)


def frequencies(config):
  noise = jax.random.uniform(jax.random.key(0), [4000])
  tokens = jax.jit(lambda x: choose(x, jnp.tile(LOGITS[:1], [4000, 1]), config))(noise)
  return np.bincount(tokens, minlength=5) / 4000


@pytest.mark.parametrize(
  ('config', 'weights'),
  [
    (SamplingConfig(), PROBABILITIES),
    (SamplingConfig(top_p=0.8), [0.5, 0.2, 0.2, 0, 0]),
    (SamplingConfig(top_p=0.6), [0.5, 0.2, 0.2, 0, 0]),
    (SamplingConfig(top_p=0.4), [1, 0, 0, 0, 0]),
    (SamplingConfig(temperature=0.5), np.square(PROBABILITIES)),
    # Temperature first: squared, the first token alone holds 3/4.
    (SamplingConfig(temperature=0.5, top_p=0.7), [1, 0, 0, 0, 0]),
    (SamplingConfig(top_k=2), [0.5, 0.2, 0, 0, 0]),
    (SamplingConfig(top_k=9), PROBABILITIES),
    # The likeliest three first: of their mass, the first one holds 5/9.
    (SamplingConfig(top_k=3, top_p=0.54), [1, 0, 0, 0, 0]),
  ],
)
def test_frequencies_of_samples(config, weights):
  expected = np.asarray(weights) / np.sum(weights)
  # Five standard deviations.
  np.testing.assert_array_less(
    np.abs(frequencies(config) - expected), 5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-6
  )


def test_any_noise_chooses_a_token_that_is_kept():
  logits = jax.random.normal(jax.random.key(0), [1, 3000])
  kept = nucleus_filter(logits, 0.9)[0] > FILTERED
  noise = jnp.concatenate(
    [jnp.linspace(0, 1, 500)[:-1], jnp.asarray([np.nextafter(1, 0, dtype='f')])]
  )
  tokens = choose(noise, jnp.tile(logits, [500, 1]), SamplingConfig(top_p=0.9))
  assert np.all(kept[tokens])
  # From the first kept one to the last, in order.
  assert np.all(np.diff(tokens) >= 0)
  assert (tokens[0], tokens[-1]) == (np.flatnonzero(kept)[0], np.flatnonzero(kept)[-1])


def test_zero_temperature_is_greedy():
  config = SamplingConfig(temperature=0.0, top_p=0.5, top_k=3)
  tokens = choose(jnp.asarray([0.0, 0.99]), LOGITS, config)
  np.testing.assert_array_equal(tokens, [0, 4])
  tied = jnp.asarray([[0.0, 2.0, 2.0]])
  np.testing.assert_array_equal(choose(jnp.asarray([0.99]), tied, config), [1])


# Float32 has no 1e-300 and 1e-46, and processors may take 1e-45 for 0.
@pytest.mark.parametrize('temperature', [1e-300, 1e-46, 1e-45, 1e-38, 1e-20])
@pytest.mark.parametrize('top_p', [1.0, 0.9])
@pytest.mark.parametrize('top_k', [0, 3])
def test_small_temperatures_are_greedy(temperature, top_p, top_k):
  logits = jnp.concatenate([LOGITS, -100 * LOGITS, 1e4 + 1e4 * LOGITS])
  noise = jnp.tile(jnp.asarray([0.0, 0.5, np.nextafter(1, 0, dtype='f')]), 6)
  rows = jnp.repeat(logits, 3, axis=0)
  tokens = choose(noise, rows, SamplingConfig(temperature, top_p, top_k))
  np.testing.assert_array_equal(tokens, np.argmax(rows, axis=-1))


ALLOWED = np.array([False, True, True, False, True])


@pytest.mark.parametrize(
  'config',
  [
    SamplingConfig(),
    SamplingConfig(temperature=1e9),
    SamplingConfig(temperature=1e30, top_p=0.99),
    SamplingConfig(top_k=2),
    SamplingConfig(top_k=5, top_p=0.7),
    SamplingConfig(temperature=0.3),
  ],
)
def test_tokens_that_are_not_allowed_are_as_if_there_were_none(config):
  noise = jnp.linspace(0, 1, 500)[:-1]
  rows = jnp.tile(LOGITS[:1], [499, 1])
  tokens = choose(noise, rows, config, ALLOWED)
  ids = np.flatnonzero(ALLOWED)
  np.testing.assert_array_equal(tokens, ids[choose(noise, rows[:, ids], config)])


@pytest.mark.parametrize('temperature', [0.0, 1e-38, 0.01])
def test_the_likeliest_token_that_is_allowed(temperature):
  # Far behind the one that is not.
  logits = jnp.asarray([[1e6, -20.0, -10.0, 0.0, -30.0]])
  assert choose(jnp.asarray([0.5]), logits, SamplingConfig(temperature), ALLOWED) == 2


@pytest.mark.parametrize(
  ('field', 'value', 'accepted'),
  [
    ('temperature', -1.0, '0 or more'),
    ('temperature', float('nan'), '0 or more'),
    ('top_p', 0.0, '(0, 1]'),
    ('top_p', 1.5, '(0, 1]'),
    ('top_k', -1, '0 (all) or more'),
    ('top_k', 2.5, '0 (all) or more'),
  ],
)
def test_refusals(field, value, accepted):
  with pytest.raises(ConfigError) as error:
    SamplingConfig(**{field: value})
  assert f'SamplingConfig.{field} = {value}' in str(error.value)
  assert accepted in str(error.value)
