"""Sinusoids and relative positions."""

import functools

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
  shift = num_keys - x.shape[-1]  # Of the last row.
  return _shift_rows(x, num_keys, shift)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _shift_rows(x: jax.Array, width: int, shift: int) -> jax.Array:
  """Column c of row i moves to column `c + shift - (L - 1 - i)` of `width`; the rest is zero."""
  # Slices are quick on CPU only: on TPU they become a loop over rows.
  shifts = {'cpu': _shift_by_slices, 'default': _shift_by_reshaping}
  shifts = {name: functools.partial(f, width=width, shift=shift) for name, f in shifts.items()}
  return jax.lax.platform_dependent(x, **shifts)


def _shift_by_slices(x: jax.Array, width: int, shift: int) -> jax.Array:
  """Row i is the slice from `L - 1 - i` of itself between zeros."""
  rows, columns = x.shape[-2:]
  left = rows - 1 + max(shift - (rows - 1), 0)
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, max(width - columns, 0) + rows - 1)])
  start = left - shift + jnp.arange(rows)[::-1]

  def one_row(row, start):
    return jax.lax.dynamic_slice_in_dim(row, start, width, axis=-1)

  return jax.vmap(one_row, in_axes=(-2, 0), out_axes=-2)(x, start)


def _shift_by_reshaping(x: jax.Array, width: int, shift: int) -> jax.Array:
  """Row after row, padded, is cut into rows that are shorter by one: row i moves right by i."""
  *outer, rows, columns = x.shape
  padded = columns + rows
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rows)]).reshape(*outer, -1)
  x = x[..., : rows * (padded - 1)].reshape(*outer, rows, padded - 1)
  left = shift - (rows - 1)
  sides = [(0, 0, 0)] * (x.ndim - 1) + [(left, width - left - (padded - 1), 0)]
  return jax.lax.pad(x, jnp.zeros([], x.dtype), sides)


def _shift_rows_fwd(x, width, shift):
  return _shift_rows(x, width, shift), x.shape[-1]


def _shift_rows_bwd(width, shift, columns, g):
  # Moves every row back: the rows' shifts are reversed by reversing their order.
  back = _shift_rows(jnp.flip(g, axis=-2), columns, g.shape[-2] - 1 - shift)
  return (jnp.flip(back, axis=-2),)


_shift_rows.defvjp(_shift_rows_fwd, _shift_rows_bwd)


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
