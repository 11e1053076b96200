"""The VQ attention sublayer: keys are quantized, and the state is of constant size."""

import jax

from tvq_t5x.network.attention import Attention, Queries, Values
from tvq_t5x.network.mixers import Aux, Call, Mixer
from tvq_t5x.network.vq import cache
from tvq_t5x.network.vq.attention import Keys
from tvq_t5x.network.vq.bidirectional import bidirectional_attention
from tvq_t5x.network.vq.cache import AttentionState
from tvq_t5x.network.vq.parts import shared_attention
from tvq_t5x.network.vq.quantizer import VectorQuantizer
from tvq_t5x.network.vq.token_attention import RingState, in_order, to_ring, token_attention


class VQAttention(Attention):
  """Softmax attention over quantized keys in time linear in T (paper, section 3)."""

  def attend(
    self,
    queries: Queries,
    keys: jax.Array,
    values: Values,
    distances: jax.Array,
    state: AttentionState | RingState | None,
    call: Call,
  ) -> tuple[jax.Array, AttentionState | RingState | tuple[()], Aux]:
    """See `Attention`."""
    return attend(queries, keys, values, distances, state, call, self)

  @property
  def shares_sequences(self) -> bool:
    """See `shared_attention` and `bidirectional_attention`."""
    return True

  def init_state(self, batch_size: int) -> AttentionState | tuple[()]:
    """An empty window and an empty cache; () in an encoder."""
    return () if self.config.bidirectional else cache.init_attention_state(self.config, batch_size)

  def state_axes(self) -> AttentionState | tuple[()]:
    """See `Mixer`."""
    return () if self.config.bidirectional else cache.attention_state_axes(self.config)

  def for_tokens(self, state: AttentionState) -> RingState:
    """The window as a ring, which a token changes in one slot."""
    return to_ring(state)

  def from_tokens(self, state: RingState, steps: jax.Array) -> AttentionState:
    """The window in order again."""
    return in_order(state, steps % self.config.window_len)


def attend(
  queries: Queries,
  keys: jax.Array,
  values: Values,
  distances: jax.Array,
  state: AttentionState | RingState | None,
  call: Call,
  module: Mixer,
) -> tuple[jax.Array, AttentionState | RingState | tuple[()], Aux]:
  """`Attention.attend` over quantized keys; the codebook is a part of `module`, which is called."""
  c = module.config
  quantized, codes, codebook, aux = VectorQuantizer(c, name='quantizer')(keys, call)
  module.sow('intermediates', 'keys', keys)
  module.sow('intermediates', 'codes', codes)
  args = queries, Keys(quantized, codes, values.active, values), distances, codebook
  if c.bidirectional:
    return bidirectional_attention(*args, call.loss_mask, c.block_len), (), aux
  if isinstance(state, RingState):
    assert call.step is not None
    out, new_state = token_attention(*args, state, call.step % c.window_len, c)
  else:
    state = cache.init_attention_state(c, keys.shape[0]) if state is None else state
    out, new_state = shared_attention(*args, state, call.position, c, call.lengths)
  return out, new_state, aux
