"""Codes that are set to keys of an update: the first ones, and those that are hardly used.

What sums gradients over microbatches, devices and hosts sums statistics; so a key is chosen by its
place in the global batch, which exactly one of them has, and all others add zero. Which codes are
set depends on the parameters alone. Letters besides those of `config`: E examples of the global
batch.
"""

import jax
import jax.numpy as jnp

from tvq_t5x.network import sequence
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.mixers import Call
from tvq_t5x.network.sequence import Part

MIN_COUNT = 0.01
# A code's average never has the count 0 again, once it has started.
NOT_STARTED = 0.0
# Of a code that starts; what c_count starts from otherwise.
_FIRST_COUNT = 1.0
# Share of the way that is left between a code's place and its key. Codes that get the same key, as
# those of one token do in the first layer, stay apart: rounding would choose between them.
_LEFT = 0.02


def to_be_set(c_count: jax.Array, config: TransformerConfig) -> tuple[jax.Array, jax.Array]:
  """Which codes are set to keys of the update.

  Args:
    c_count: [N, S], averaged counts before the update.
    config: says which.

  Returns:
    [N, S] bool, and the count [N, S] that such a code has after the update.
  """
  start = (c_count == NOT_STARTED) & config.codes_from_keys
  least = config.replace_below * jnp.mean(c_count, axis=-1, keepdims=True)
  return start | (c_count < least), jnp.where(start, _FIRST_COUNT, 2 * least)


def candidates(keys: jax.Array, call: Call, num_codes: int) -> tuple[jax.Array, jax.Array]:
  """One key of the update for each code.

  Code s has one of the counted positions of example `s mod E`. Those of an example are shared out
  among its codes, and each takes one of its share.

  Args:
    keys: [B, T, N, K], of some examples.
    call: says which examples, and which positions count.
    num_codes: S.

  Returns:
    [N, S, K] float32, zero where another part of the batch has the example, and [S] float32, 1
    where this one has it.
  """
  num_examples = len(keys) if call.num_examples is None else call.num_examples
  counted = call.loss_mask > 0
  number = jnp.sum(counted, axis=1, dtype=jnp.int32)[:, None]  # [B, 1]
  code = jnp.arange(num_codes)
  example, share, shares = code % num_examples, code // num_examples, -(-num_codes // num_examples)
  begin, end = number * share // shares, number * (share + 1) // shares  # [B, S]
  # The golden section spreads the places within their shares.
  rank = begin + (end - begin) * (example * 158 % 256) // 256
  found = (call.example_ids[:, None] == example) & (number > 0)
  found = found.astype(jnp.float32)
  if sequence.num_parts(keys.shape[1]) > 1:
    _, chosen = sequence.on_parts(_counted_keys_of_part, (keys, counted), rank, ())
  else:
    chosen = _counted_keys(keys, counted, rank)
  chosen = chosen.astype(jnp.float32)
  return jnp.einsum('bs,bsnk->nsk', found, chosen), jnp.sum(found, axis=0)


def _counted_keys(keys: jax.Array, counted: jax.Array, rank: jax.Array) -> jax.Array:
  """Keys [B, S, N, K] of some ranks [B, S] among the positions [B, T] that count."""
  counted_first = jnp.argsort(~counted, axis=1, stable=True)
  position = jnp.take_along_axis(counted_first, rank, axis=1)
  return jnp.take_along_axis(keys, position[:, :, None, None], axis=1)


def _counted_keys_of_part(
  part: Part, sequences: tuple[jax.Array, jax.Array], rank: jax.Array, shared: tuple[()]
) -> tuple[tuple[()], jax.Array]:
  """`_counted_keys` where devices share the positions: exactly one of them has each."""
  del shared
  keys, counted = sequences
  number = jnp.sum(counted, axis=1, dtype=jnp.int32)[:, None]
  before = part.before_each(jnp.zeros_like(number), number, lambda old, new, _: old + new)
  rank = rank - before
  here = (rank >= 0) & (rank < number)
  chosen = _counted_keys(keys, counted, jnp.clip(rank, 0, keys.shape[1] - 1))
  return (), jax.lax.psum(jnp.where(here[:, :, None, None], chosen, 0), part.axis)


def set_codes(
  statistics: tuple[jax.Array, jax.Array],
  averages: tuple[jax.Array, jax.Array],
  keys: jax.Array,
  call: Call,
  config: TransformerConfig,
) -> tuple[jax.Array, jax.Array]:
  """Statistics whose moving average sets some codes to keys of the update.

  Args:
    statistics: sums [N, S, K] and counts [N, S] of keys by code, of a part of the batch.
    averages: those of the codebook before the update.
    keys: [B, T, N, K], of the part of the batch.
    call: of these.
    config: for S, gamma and which codes are set.

  Returns:
    The statistics; those of a code that is set are the ones that bring its average to a key.
  """
  decay = config.ema_decay
  c_sum, c_count = averages
  chosen, found = candidates(keys, call, config.num_codes)
  is_set, count = to_be_set(c_count, config)
  places = found[:, None] * c_sum / jnp.maximum(c_count, MIN_COUNT)[..., None]
  places = (1 - _LEFT) * chosen + _LEFT * places

  def replace(old, average, new):
    # Solved for the statistics: gamma average + (1 - gamma) statistics = new.
    own = is_set.reshape(is_set.shape + (1,) * (old.ndim - 2))
    has = found.reshape(found.shape + (1,) * (old.ndim - 2))
    return jnp.where(own, (new - has * decay * average) / (1 - decay), old)

  sums = replace(statistics[0], c_sum, count[..., None] * places)
  return sums, replace(statistics[1], c_count, count * found)
