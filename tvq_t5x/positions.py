"""Sinusoids and relative positions."""

import jax
import jax.numpy as jnp


def sinusoids(positions: jax.Array, width: int, max_wavelength: float) -> jax.Array:
  """Sinusoidal embeddings, `[sin | cos]` concatenated.

  Args:
    positions: [...] positions or distances.
    width: D, even.
    max_wavelength: the wavelengths are `2 pi max_wavelength^(2c/D)`.

  Returns:
    [..., D] float32.
  """
  exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
  angles = positions[..., None].astype(jnp.float32) / max_wavelength**exponents
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def relative_shift(x: jax.Array, num_keys: int) -> jax.Array:
  """Moves row i of x by i columns, so that columns of distances become columns of keys.

  Args:
    x: [..., L, E]; column E-1 of row i belongs to key `num_keys - L + i`, earlier columns to the
      keys before it.
    num_keys: columns of the result.

  Returns:
    [..., L, num_keys]; zero where x has no column for a key.
  """
  *prefix, rows, columns = x.shape
  width = columns + rows - 1
  x = jnp.pad(x, [(0, 0)] * len(prefix) + [(0, 0), (0, rows)])
  x = x.reshape(*prefix, rows * (width + 1))[..., : rows * width]
  return x.reshape(*prefix, rows, width)[..., width - num_keys :]


def window_mask(
  block_len: int, window_len: int, num_empty: jax.Array, within_window: bool
) -> jax.Array:
  """Which keys of the window and of the present block a query may attend to.

  Args:
    block_len: L queries.
    window_len: M; key j of M + L is at position `j - M` of the block.
    num_empty: [...] int32, slots of the window that were never filled.
    within_window: whether keys further back than M from the query are left out.

  Returns:
    [..., L, M + L] bool.
  """
  query = jnp.arange(block_len)[:, None]
  key = jnp.arange(window_len + block_len)[None, :]
  keep = key - window_len <= query
  if within_window:
    keep = keep & (key >= query)
  return keep & (key >= num_empty[..., None, None])
