"""Sinusoids and relative positions."""

import functools

import jax
import jax.numpy as jnp

from tvq_t5x.network import xla


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
  return xla.shift_rows(x, num_keys, shift)


def window_mask(
  block_len: int, window_len: int, num_empty: jax.Array, within_window: bool
) -> tuple[jax.Array, jax.Array]:
  """Which keys of the window and of the present block a query may attend to.

  Args:
    block_len: L queries.
    window_len: M; key j of the window is at position `j - M` of the block.
    num_empty: [...] int32, slots of the window that were never filled.
    within_window: whether keys further back than M from the query are left out.

  Returns:
    [..., L or 1, M] bool of the window's keys, and [L, L] of the block's.
  """
  query = jnp.arange(block_len)[:, None]
  in_window = jnp.arange(window_len) >= num_empty[..., None, None]
  in_present = jnp.arange(block_len) <= query
  if within_window:
    in_window = in_window & (jnp.arange(window_len) >= query)
    in_present = in_present & (jnp.arange(block_len) + window_len >= query)
  return in_window, in_present


def key_nearness(queries: jax.Array, distances: jax.Array, num_keys: int) -> jax.Array:
  """What the distances of keys add to their scores.

  Args:
    queries: [B, T, N, G, K].
    distances: [M + 1, N, K], or scores [M + 1, N]; row d is of keys at distance d.
    num_keys: S, at least T; the last T keys are at the queries' positions.

  Returns:
    [B, N, G, T, S] float32, or 1 for B and G; zero for keys at a distance over M, and after the
    query.
  """
  num_queries, reach = queries.shape[1], len(distances)
  if distances.ndim == 2:
    scores = distances[::-1].T.astype(jnp.float32)[:, None, None]
    nearness = jnp.broadcast_to(scores, (1, len(scores), 1, num_queries, reach))
  else:
    nearness = jnp.einsum(
      'BTNGK,DNK->BNGTD', queries, distances[::-1], preferred_element_type=jnp.float32
    )
  nearness = relative_shift(nearness, num_queries + reach - 1)  # Columns end at the last key.
  excess = num_keys - nearness.shape[-1]
  return jnp.pad(nearness, [(0, 0)] * 4 + [(max(excess, 0), 0)])[..., max(-excess, 0) :]


def nearness_both_ways(queries: jax.Array, distances: jax.Array) -> jax.Array:
  """What the distances of keys, before and after, add to their scores.

  Args:
    queries: [B, T, N, G, K].
    distances: [2M + 1, N, K], or scores [2M + 1, N]; row `i - j + M` is of query i and key j.

  Returns:
    [B, N, G, T, T] float32, or 1 for B and G; zero for keys at a distance over M.
  """
  length, reach = queries.shape[1], len(distances) // 2
  # Rows count back from M after the query, in a sequence with M keys more on either side.
  nearness = key_nearness(queries, distances, length + 2 * reach)
  return nearness[..., reach : reach + length]


def last_positions(x: jax.Array, number: int, lengths: jax.Array | None) -> jax.Array:
  """The last positions that count of those before a segment and in it.

  Args:
    x: [B, number + T, ...].
    number: of positions before the segment, and of the result.
    lengths: [B] int32, how many of the T count in each row; None means all.

  Returns:
    [B, number, ...].
  """
  if lengths is None:
    return x[:, x.shape[1] - number :]
  last = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=number)
  return jax.vmap(last)(x, lengths)
