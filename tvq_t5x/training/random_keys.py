"""Keys of random numbers from seeds."""

import jax

from tvq_t5x.common.errors import A_SEED, ConfigError, is_seed


def key_of(seed: int, setting: str) -> jax.Array:
  """The key of a seed, another one for each; `jax.random.key` by itself takes 32 bits of it.

  Args:
    seed: of 64 bits. The key of one below 2**32, and not negative, is `jax.random.key(seed)`.
    setting: its name, for the message.

  Raises:
    ConfigError: if it is no whole number of 64 bits.
  """
  if not is_seed(seed):
    raise ConfigError(setting, seed, A_SEED)
  with jax.enable_x64(True):
    return jax.random.key(seed)
