"""Sampling with a state of constant size: one compiled loop, one token a step."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tvq_t5x.errors import ConfigError
from tvq_t5x.transformer import DecoderState

FILTERED = -1e10
# Slack of the nucleus threshold, as in the paper's code.
_EPSILON = 1e-4


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How a token is chosen.

  Attributes:
    temperature: divides the logits; 0 chooses the likeliest token.
    top_p: share of the probability mass to sample from, in (0, 1].
  """

  temperature: float = 1.0
  top_p: float = 1.0

  def __post_init__(self):
    if self.temperature < 0:
      raise ConfigError(f'SamplingConfig.temperature = {self.temperature}: give 0 or more.')
    if not 0 < self.top_p <= 1:
      raise ConfigError(f'SamplingConfig.top_p = {self.top_p}: give a share in (0, 1].')


def nucleus_filter(logits: jax.Array, top_p: float) -> jax.Array:
  """Keeps the tokens of which strictly likelier ones hold less than `top_p` of the mass.

  Args:
    logits: [..., W]; the likeliest token and its ties are always kept.
    top_p: share of the mass.

  Returns:
    [..., W], with -1e10 in place of the others.
  """
  probabilities = jax.nn.softmax(logits, axis=-1)
  ordered = -jnp.sort(-probabilities, axis=-1)
  mass_before = jnp.cumsum(ordered, axis=-1) - ordered
  kept = mass_before < top_p - _EPSILON
  # A tie of a kept token is kept: the strictly likelier mass is the same for both.
  least = jnp.min(jnp.where(kept, ordered, 2.0), axis=-1, keepdims=True)
  least = jnp.minimum(least, ordered[..., :1])
  return jnp.where(probabilities >= least, logits, FILTERED)


def choose(rng: jax.Array, logits: jax.Array, config: SamplingConfig) -> jax.Array:
  """Chooses a token [B] int32 for each row of logits [B, W]."""
  if config.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / config.temperature
  if config.top_p < 1:
    logits = nucleus_filter(logits, config.top_p)
  return jax.random.categorical(rng, logits).astype(jnp.int32)


def sample(
  next_logits: Callable[[jax.Array, DecoderState], tuple[jax.Array, DecoderState]],
  state: DecoderState,
  start: jax.Array,
  prompts: jax.Array,
  rng: jax.Array,
  config: SamplingConfig,
) -> tuple[jax.Array, jax.Array]:
  """Generates the tokens that prompts leave open.

  Args:
    next_logits: maps tokens [B, 1] and the state before them to logits [B, 1, W] and a new state.
    state: before the first token.
    start: [B] int32, token before the first one (EOS starts a sequence).
    prompts: [B, T] int32; the first 0 of a row is the first token to generate.
    rng: key.
    config: how a token is chosen.

  Returns:
    Tokens [B, T] with the prompts, and the log-likelihood [B] of the generated ones in nats.
  """
  in_prompt = jnp.cumprod(prompts != 0, axis=1).astype(bool)

  def step(carry, inputs):
    previous, state, scores = carry
    prompt, given, index = inputs
    logits, state = next_logits(previous[:, None], state)
    logits = logits[:, 0]
    token = jnp.where(given, prompt, choose(jax.random.fold_in(rng, index), logits, config))
    score = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    return (token, state, scores + jnp.where(given, 0.0, score)), token

  inputs = (prompts.T, in_prompt.T, jnp.arange(prompts.shape[1]))
  zeros = jnp.zeros(start.shape, jnp.float32)
  (_, _, scores), tokens = jax.lax.scan(step, (start.astype(jnp.int32), state, zeros), inputs)
  return tokens.T, scores
