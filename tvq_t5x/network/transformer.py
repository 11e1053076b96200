"""The decoder-only stack: one forward function for training, evaluation and decoding."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from jax.nn import initializers
from jax.sharding import PartitionSpec

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network.config import AttentionType, HeadType, Remat, TransformerConfig
from tvq_t5x.network.layers import (
  KEEP_MARKED,
  Einsum,
  Embedding,
  Logits,
  Mlp,
  RMSNorm,
  example_dropout,
  keep,
  rms_normalize,
  with_sharding_constraint,
)
from tvq_t5x.network.positions import sinusoids
from tvq_t5x.network.vq.attention import Keys, Queries, vq_attention
from tvq_t5x.network.vq.cache import AttentionState, attention_state_axes, init_attention_state
from tvq_t5x.network.vq.quadratic import quadratic_attention
from tvq_t5x.network.vq.quantizer import QuantizerAux, VectorQuantizer
from tvq_t5x.network.vq.token_attention import RingState, token_attention

# Masks drawn from this collection stay the same for all updates of a sequence.
SEQUENCE_DROPOUT = 'sequence_dropout'
DROPOUT = 'dropout'

# One for each attention sublayer of a layer; RingStates for one token after the other.
LayerState = tuple[AttentionState | RingState, ...]


class DecoderState(NamedTuple):
  """What the model remembers of the tokens before a segment."""

  position: jax.Array  # [B] int32, how many tokens those are.
  # A tuple of layers, or with scan_layers one LayerState stacked on a leading layers axis.
  layers: LayerState | tuple[LayerState, ...]


class Call(NamedTuple):
  """What every layer of one forward call is told."""

  position: jax.Array  # [B] int32, of the segment's first token
  loss_mask: jax.Array  # [B, T] float32
  example_ids: jax.Array  # [B] int32, place in the global batch: selects dropout masks
  lengths: jax.Array | None  # [B] int32, how many tokens the state takes in; None means all
  oldest: jax.Array | None  # [] int32, slot in the windows of RingStates


def init_decoder_state(config: TransformerConfig, batch_size: int) -> DecoderState:
  """The state before the first token of B sequences."""
  if config.attention_type == AttentionType.QUADRATIC:
    return DecoderState(jnp.zeros([batch_size], jnp.int32), ())

  def layer() -> LayerState:
    sublayers = range(config.num_attention_sublayers)
    return tuple(init_attention_state(config, batch_size) for _ in sublayers)

  if config.scan_layers:
    layers = jax.tree.map(lambda x: jnp.stack([x] * config.num_layers), layer())
  else:  # Arrays of their own, which can be donated.
    layers = tuple(layer() for _ in range(config.num_layers))
  return DecoderState(jnp.zeros([batch_size], jnp.int32), layers)


def decoder_state_axes(config: TransformerConfig) -> DecoderState:
  """Logical axis names of the arrays of a DecoderState, a PartitionSpec in the place of each."""
  position = PartitionSpec('batch')
  if config.attention_type == AttentionType.QUADRATIC:
    return DecoderState(position, ())
  layer = (attention_state_axes(config),) * config.num_attention_sublayers
  if config.scan_layers:
    return DecoderState(position, jax.tree.map(lambda axes: PartitionSpec('layers', *axes), layer))
  return DecoderState(position, (layer,) * config.num_layers)


def batch_axes(config: TransformerConfig) -> DecoderState:
  """The batch axis of each array of a DecoderState."""
  return jax.tree.map(lambda axes: tuple(axes).index('batch'), decoder_state_axes(config))


class Attention(nn.Module):
  """An attention sublayer, gated or plain, over quantized or unquantized keys."""

  config: TransformerConfig
  deterministic: bool

  @nn.compact
  def __call__(
    self, x: jax.Array, state: AttentionState | RingState | None, call: Call
  ) -> tuple[jax.Array, AttentionState | RingState | None, QuantizerAux | None]:
    """[B, T, D] to the residual branch [B, T, D], the new state and the quantizer's losses."""
    c = self.config
    d, n, g, h = c.emb_dim, c.num_kv_heads, c.queries_per_kv_head, c.num_heads
    k, v = c.key_dim, c.value_dim
    gated = c.head_type == HeadType.GATED
    heads, kv_heads = c.heads_axis(h), c.heads_axis(n)
    scale = k**-0.25

    def project(name, width, num_heads, heads_axis, width_axis):
      axes = ('embed', heads_axis, width_axis)
      einsum = Einsum('BTD,DHK->BTHK', (d, num_heads, width), axes, dtype=c.dtype, name=name)
      return lambda x: keep(einsum(x))

    x = RMSNorm(name='norm')(x)
    q = scale * rms_normalize(project('query', k, h, heads, 'kv')(x))
    keys = scale * rms_normalize(project('key', k, n, kv_heads, 'kv')(x))
    values = project('value', v, n, kv_heads, c.value_axis)(x)
    values = jax.nn.silu(values) if gated else values
    q = with_sharding_constraint(q, ('batch', 'length', heads, 'kv'))
    keys = with_sharding_constraint(keys, ('batch', 'length', kv_heads, 'kv'))
    values = with_sharding_constraint(values, ('batch', 'length', kv_heads, c.value_axis))

    bias = {
      name: nn_partitioning.param_with_axes(
        name, initializers.zeros, (h, k), jnp.float32, axes=(heads, 'kv')
      )
      for name in ('content_bias', 'position_bias')
    }
    queries = Queries(
      *(
        (q + scale * bias[name].astype(c.dtype)).reshape(*q.shape[:2], n, g, k)
        for name in ('content_bias', 'position_bias')
      )
    )
    distances = sinusoids(jnp.arange(c.window_len + 1), d, c.max_wavelength)
    distances = self._drop_sinusoids(distances).astype(c.dtype)
    distances = scale * Einsum(
      'CD,DNK->CNK', (d, n, k), ('embed', kv_heads, 'kv'), dtype=c.dtype, name='distance'
    )(distances)

    if c.attention_type == AttentionType.QUADRATIC:
      out, new_state, aux = quadratic_attention(queries, keys, values, distances), None, None
    else:
      quantized, codes, codebook, aux = VectorQuantizer(c, name='quantizer')(keys, call.loss_mask)
      self.sow('intermediates', 'keys', keys)
      self.sow('intermediates', 'codes', codes)
      segment = Keys(quantized, codes, values)
      args = queries, segment, distances, codebook
      if isinstance(state, RingState):
        out, new_state = token_attention(*args, state, call.oldest, c)
      else:
        out, new_state = vq_attention(*args, state, call.position, c, call.lengths)
    out = out.reshape(*out.shape[:2], h, v)
    if gated:
      out = out * jax.nn.silu(project('gate', v, h, heads, c.value_axis)(x))
    out = with_sharding_constraint(out, ('batch', 'length', heads, c.value_axis))
    out = Einsum(
      'BTHV,HVD->BTD', (h, v, d), (heads, c.value_axis, 'embed'), 2, dtype=c.dtype, name='out'
    )(out)
    return out, new_state, aux

  def _drop_sinusoids(self, x: jax.Array) -> jax.Array:
    rate = self.config.sinusoid_dropout_rate
    if self.deterministic or not rate:
      return x
    kept = jax.random.bernoulli(self.make_rng(SEQUENCE_DROPOUT), 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0)


class Layer(nn.Module):
  """Two gated attention sublayers, or one plain attention sublayer and an MLP."""

  config: TransformerConfig
  deterministic: bool

  @nn.compact
  def __call__(
    self, x: jax.Array, state: LayerState, call: Call
  ) -> tuple[jax.Array, tuple[LayerState, QuantizerAux | None]]:
    """[B, T, D] to [B, T, D], with the new state and losses stacked over attention sublayers."""
    c = self.config
    vq = c.attention_type == AttentionType.VQ
    x = with_sharding_constraint(x, ('batch', 'length', 'embed'))
    new_states, aux = [], []
    attention_cls = Attention
    if c.remat == Remat.ATTENTION:
      attention_cls = nn_partitioning.remat(
        Attention, policy=KEEP_MARKED, prevent_cse=not c.scan_layers
      )
    for i in range(c.num_attention_sublayers):
      attention = attention_cls(c, self.deterministic, name=f'attention_{i}')
      branch, new_state, sublayer_aux = attention(x, state[i] if vq else None, call)
      x = self._add(x, branch, call)
      new_states.append(new_state)
      aux.append(sublayer_aux)
    if c.head_type != HeadType.GATED:
      x = self._add(x, Mlp(c, name='mlp')(x), call)
    if not vq:
      return x, ((), None)
    return x, (tuple(new_states), jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux))

  def _add(self, x: jax.Array, branch: jax.Array, call: Call) -> jax.Array:
    """The residual connection, with dropout and LayerDrop on the branch."""
    c = self.config
    if not self.deterministic and c.residual_dropout_rate:
      rng = self.make_rng(DROPOUT)
      branch = example_dropout(rng, branch, c.residual_dropout_rate, call.example_ids)
    if not self.deterministic and c.layer_drop_rate:
      rng = self.make_rng(SEQUENCE_DROPOUT)
      branch = example_dropout(rng, branch, c.layer_drop_rate, call.example_ids, per_example=True)
    return with_sharding_constraint(x + branch, ('batch', 'length', 'embed'))


class Transformer(nn.Module):
  """Transformer-VQ language model."""

  config: TransformerConfig

  @property
  def scan_layers(self) -> bool:
    """Whether layers are stacked; T5X asks its modules."""
    return self.config.scan_layers

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    state: DecoderState | None = None,
    *,
    loss_mask: jax.Array | None = None,
    example_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    oldest: jax.Array | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, DecoderState, QuantizerAux | None]:
    """Runs the model over a segment: a whole sequence, part of one, or one token.

    Args:
      tokens: [B, T] int32; L divides T, or T < L.
      state: of the tokens before the segment; None at the start of a sequence. The quadratic
        baseline keeps none: with it, a segment is a whole sequence.
      loss_mask: [B, T]; positions with 0 enter attention but no loss and no statistic.
      example_ids: [B] int32, place of each example in the global batch; None means 0 to B - 1.
      lengths: [B] int32, how many tokens of each row the state after the segment is of; the rest is
        padding. None means all T.
      oldest: [] int32, of a `state` of RingStates, which take one token a row: the slot of the
        windows' oldest position.
      deterministic: False applies dropout, with rngs 'dropout' (new for each update) and
        'sequence_dropout' (the same for all updates of a sequence).

    Returns:
      Logits [B, T, W] float32, the state after the segment, and the quantizers' losses and
      metrics, every leaf [layers, attention sublayers] (None for the quadratic baseline).

    Raises:
      ConfigError: for the quadratic baseline with `lengths` or `oldest`.
    """
    c = self.config
    batch_size, length = tokens.shape
    if c.attention_type == AttentionType.QUADRATIC and not (lengths is None and oldest is None):
      raise ConfigError(
        f'TransformerConfig.attention_type = {c.attention_type.value!r} keeps no state, which '
        "`lengths` and `oldest` are about: give 'vq'."
      )
    if state is None:
      state = init_decoder_state(c, batch_size)
    call = Call(
      position=state.position,
      loss_mask=jnp.ones(tokens.shape, jnp.float32)
      if loss_mask is None
      else loss_mask.astype(jnp.float32),
      example_ids=jnp.arange(batch_size) if example_ids is None else example_ids,
      lengths=lengths,
      oldest=oldest,
    )
    embedding = Embedding(c, name='token_embedder')
    x = embedding(tokens)
    if c.absolute_positions:
      scale = nn_partitioning.param_with_axes(
        'position_scale', initializers.zeros, (), jnp.float32, axes=()
      )
      positions = state.position[:, None] + jnp.arange(length)
      x = x + (scale * sinusoids(positions, c.emb_dim, c.max_wavelength)).astype(c.dtype)
    x = with_sharding_constraint(x, ('batch', 'length', 'embed'))
    x, layers, aux = self._layers(x, state, call, deterministic)
    if c.final_norm:
      x = RMSNorm(name='final_norm')(x)
    logits = Logits(c, name='logits')(x, embedding if c.tied_embeddings else None)
    logits = with_sharding_constraint(logits, ('batch', 'length', 'vocab'))
    position = state.position + (length if lengths is None else lengths)
    return logits, DecoderState(position, layers), aux

  def _layers(self, x: jax.Array, state: DecoderState, call: Call, deterministic: bool):
    c = self.config
    layer_cls = Layer
    if c.remat == Remat.LAYER:
      # Under scan nothing is merged back by common-subexpression elimination.
      layer_cls = nn_partitioning.remat(Layer, prevent_cse=not c.scan_layers)
    if c.scan_layers:
      layers = nn_partitioning.scan_with_axes(
        layer_cls,
        variable_axes={'params': 0, 'intermediates': 0},
        split_rngs={'params': True, DROPOUT: True, SEQUENCE_DROPOUT: True},
        in_axes=(0, nn.broadcast),
        out_axes=0,
        length=c.num_layers,
        axis_name='layers',
      )
      x, (new_layers, aux) = layers(c, deterministic, name='layers')(x, state.layers, call)
      return x, new_layers, aux
    new_layers, aux = [], []
    for i in range(c.num_layers):
      layer = layer_cls(c, deterministic, name=f'layers_{i}')
      layer_state = state.layers[i] if state.layers else ()
      x, (new_layer, layer_aux) = layer(x, layer_state, call)
      new_layers.append(new_layer)
      aux.append(layer_aux)
    if c.attention_type == AttentionType.QUADRATIC:
      return x, (), None
    return x, tuple(new_layers), jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux)
