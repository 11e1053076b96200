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
  square = jnp.where(row + jnp.arange(length + 1) < length, own, following)
  square = square.reshape(*square.shape[:-2], length + 1, length)[..., :length, :]
  window = jnp.where(column >= row, square, 0.0)
  return window, jnp.where(column == row, distance_scores(queries, distances[:1]), square)
