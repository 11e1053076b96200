"""What the distances of near keys add to their scores, by block."""

import jax
import jax.numpy as jnp

from tvq_t5x.network import xla
from tvq_t5x.network.attention import distance_scores
from tvq_t5x.network.positions import relative_shift


def window_nearness(queries: jax.Array, distances: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What distances add to the scores of a block's queries.

  Args:
    queries: [..., N, G, L, K].
    distances: [M + 1, N, K], whose products with the queries these are; or [M + 1, N], the scores
      themselves. Row d is of keys at distance d.

  Returns:
    For the M keys before the block [..., N, G, L, M] float32, zero at a distance over M; and for
    the keys of the block [..., N, G, L, L], of which those after the query have any finite value.
    Or what broadcasts to that.
  """
  block_len, window_len = queries.shape[-2], len(distances) - 1
  if block_len == window_len and xla.platform() != 'cpu':
    return _folded(queries, distances)
  nearness = distance_scores(queries, distances[::-1])
  nearness = relative_shift(nearness, window_len + block_len)
  return nearness[..., :window_len], nearness[..., window_len:]


def _folded(queries: jax.Array, distances: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`window_nearness` for L = M, by moving half as many numbers.

  Query i is at a distance up to M from the window's keys i to M - 1 and from the block's keys 0 to
  i: one square of scores has both, but for the query's own key. In rows of M + 1 columns, that are
  then read as rows of M, row i moves right by i, and what it has no room for is what the next row
  lacks on its left: there, the next query's scores are to be.
  """
  length = queries.shape[-2]
  row, column = jnp.arange(length)[:, None], jnp.arange(length)
  backwards = distances[::-1]  # Column e of row i is of distance M - e, of the next one M + 1 - e.
  own = distance_scores(queries, backwards)
  following = distance_scores(jnp.roll(queries, -1, axis=-2), jnp.roll(backwards, 1, axis=0))
  rows = jnp.where(row + jnp.arange(length + 1) < length, own, following)
  cut_anew = _cut_anew_in_training if xla.in_training() else _cut_anew
  square = cut_anew(xla.row_major(rows))
  window = jnp.where(column >= row, square, 0.0)
  return window, jnp.where(column == row, distance_scores(queries, distances[:1]), square)


def _cut_anew(rows: jax.Array) -> jax.Array:
  """Rows [..., L, L + 1], one after the other, cut into rows of L, of which the first L count."""
  length = rows.shape[-2]
  return rows.reshape(*rows.shape[:-2], length + 1, length)[..., :length, :]


_cut_anew_in_training = jax.custom_vjp(_cut_anew)


def _cut_anew_bwd(_, g):
  length = g.shape[-1]
  # What computes the gradient writes it into more rows: XLA would copy it there to add zeros.
  rows = jax.lax.empty((*g.shape[:-2], length + 1, length), g.dtype)
  rows = jax.lax.dynamic_update_slice_in_dim(rows, g, 0, -2)
  rows = xla.row_major(rows.reshape(*g.shape[:-1], length + 1))
  row, column = jnp.arange(length)[:, None], jnp.arange(length + 1)
  return (jnp.where((row == length - 1) & (column > 0), jnp.zeros([], g.dtype), rows),)


_cut_anew_in_training.defvjp(lambda rows: (_cut_anew(rows), None), _cut_anew_bwd)
