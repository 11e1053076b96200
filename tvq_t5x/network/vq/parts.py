"""VQ attention of sequences that devices share: each attends from its part of the positions.

A part takes the window from the part before it, and the compressed caches of all parts before;
neither grows with the length.
"""

import functools

import jax

from tvq_t5x.network import sequence, xla
from tvq_t5x.network.attention import Queries
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import save_for_backward
from tvq_t5x.network.sequence import Part
from tvq_t5x.network.vq import cache
from tvq_t5x.network.vq.attention import Keys, compress, vq_attention
from tvq_t5x.network.vq.cache import AttentionState, CompressedCache


def shared_attention(
  queries: Queries,
  keys: Keys,
  distances: jax.Array,
  codebook: jax.Array,
  state: AttentionState,
  position: jax.Array,
  config: TransformerConfig,
  lengths: jax.Array | None = None,
) -> tuple[jax.Array, AttentionState]:
  """`vq_attention`, on the devices that share the sequences or, in training, the batch."""
  c = config
  if sequence.num_parts(keys.codes.shape[1], c.window_len, c.block_len) == 1:

    def attend(rows, shared):
      (queries, keys, state, position, lengths), (distances, codebook) = rows, shared
      return vq_attention(queries, keys, distances, codebook, state, position, c, lengths)

    args = (queries, keys, state, position, lengths), (distances, codebook)
    return sequence.on_rows(attend, *args) if xla.in_training() else attend(*args)
  function = functools.partial(_attention_of_part, config=c)
  return sequence.on_parts(
    function, (queries, keys), (state, position, lengths), (distances, codebook)
  )


def _attention_of_part(
  part: Part,
  sequences: tuple[Queries, Keys],
  states: tuple[AttentionState, jax.Array, jax.Array | None],
  shared: tuple[jax.Array, jax.Array],
  config: TransformerConfig,
) -> tuple[jax.Array, AttentionState]:
  """Of queries and keys of one part; states are those before the whole sequences."""
  (queries, keys), (state, position, lengths) = sequences, states
  length = keys.codes.shape[1]
  owner, lengths = part.ends(lengths, length)
  window = Keys(state.keys, state.codes, state.values)
  last = keys._replace(projected=None)
  last = jax.tree.map(lambda x: x[:, length - config.window_len :], last)
  window = jax.tree.map(save_for_backward, part.from_previous(window, last))
  own = compress(keys, window, lengths, config)
  before = part.before_each(state.cache, own, _merge)
  before = before._replace(means=save_for_backward(before.means))
  state = AttentionState(window.codes, window.quantized, window.values, before)
  position = position + part.index * length
  out, after = vq_attention(queries, keys, *shared, state, position, config, lengths)
  return out, part.of_owner(owner, after)


def _merge(old: CompressedCache, new: CompressedCache, num_parts: int) -> CompressedCache:
  del num_parts
  return cache.merge(old, new)
