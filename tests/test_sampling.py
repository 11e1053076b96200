import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvq_t5x.errors import ConfigError
from tvq_t5x.sampling import FILTERED, SamplingConfig, choose, nucleus_filter, sample

PROBABILITIES = [0.5, 0.2, 0.2, 0.07, 0.03]
LOGITS = jnp.log(jnp.asarray([PROBABILITIES, PROBABILITIES[::-1]])) + 3.0


@pytest.mark.parametrize(
  ('top_p', 'kept'),
  [(0.01, 1), (0.45, 1), (0.6, 3), (0.75, 3), (0.85, 3), (0.95, 4), (0.99, 5), (1.0, 5)],
)
def test_nucleus(top_p, kept):
  """Tied tokens are kept or left out together."""
  ours = nucleus_filter(LOGITS, top_p)
  mask = np.arange(5) < kept
  for row, row_mask, logits in zip(ours, [mask, mask[::-1]], LOGITS, strict=True):
    np.testing.assert_array_equal(row, np.where(row_mask, logits, FILTERED))


def frequencies(config):
  keys = jax.random.split(jax.random.key(0), 4000)
  tokens = jax.jit(jax.vmap(lambda key: choose(key, LOGITS[:1], config)[0]))(keys)
  return np.bincount(tokens, minlength=5) / 4000


@pytest.mark.parametrize(
  ('temperature', 'top_p', 'weights'),
  [
    (1.0, 1.0, PROBABILITIES),
    (1.0, 0.8, [0.5, 0.2, 0.2, 0, 0]),
    (0.5, 1.0, np.square(PROBABILITIES)),
    # Temperature first: squared, the first token alone holds 3/4.
    (0.5, 0.7, [1, 0, 0, 0, 0]),
  ],
)
def test_frequencies_of_samples(temperature, top_p, weights):
  expected = np.asarray(weights) / np.sum(weights)
  ours = frequencies(SamplingConfig(temperature, top_p))
  # Five standard deviations.
  np.testing.assert_array_less(
    np.abs(ours - expected), 5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-6
  )


def test_zero_temperature_is_greedy():
  for seed in range(3):
    tokens = choose(jax.random.key(seed), LOGITS, SamplingConfig(temperature=0.0, top_p=0.5))
    np.testing.assert_array_equal(tokens, [0, 4])


@pytest.mark.parametrize(
  ('field', 'value', 'accepted'),
  [('temperature', -1.0, '0 or more'), ('top_p', 0.0, '(0, 1]'), ('top_p', 1.5, '(0, 1]')],
)
def test_refusals(field, value, accepted):
  with pytest.raises(ConfigError) as error:
    SamplingConfig(**{field: value})
  assert f'SamplingConfig.{field} = {value}' in str(error.value)
  assert accepted in str(error.value)


def test_sample_feeds_each_token_back_with_its_state():
  """A model that continues 1, 2, 3, ... and counts its calls: its state is threaded through."""

  def next_logits(tokens, calls):
    following = jax.nn.one_hot((tokens + 1) % 10, 10) * 5.0
    return following, calls + 1

  prompts = jnp.asarray([[3, 4, 0, 0, 0], [0, 7, 7, 0, 0], [9, 1, 2, 3, 4]])
  tokens, scores = sample(
    next_logits, jnp.int32(0), jnp.asarray([1, 6, 1]), prompts, jax.random.key(0), SamplingConfig(0)
  )
  # In the second row 0 comes first, so all is generated, from the start token on. A generated 0 is
  # a token like any other.
  np.testing.assert_array_equal(tokens, [[3, 4, 5, 6, 7], [7, 8, 9, 0, 1], [9, 1, 2, 3, 4]])
  each = float(jax.nn.log_softmax(jnp.asarray([5.0] + [0.0] * 9))[0])
  np.testing.assert_allclose(scores, [3 * each, 5 * each, 0], rtol=1e-5)
