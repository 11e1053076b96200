"""An encoder that tells the class of a text, of two texts, or of a sequence of real numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from jax.nn import initializers

from tvq_t5x.common.errors import ConfigError, is_count
from tvq_t5x.network import sublayers
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import Einsum, Embedding, RMSNorm, with_sharding_constraint
from tvq_t5x.network.mixers import Call
from tvq_t5x.network.transformer import LayerAux, embed_positions, run_layers


class Classifier(nn.Module):
  """Layers whose positions see all of a sequence, their mean, and a head of two projections.

  The head is `Linear(D -> V)`, gelu, `Linear(V -> classes)`, as in Mega (arXiv 2209.10655); of two
  texts, it takes `[a, b, a * b, a - b]` of their means.

  Attributes:
    config: of the layers, with `bidirectional`.
    num_classes: classes.
    real_inputs: whether the inputs are real numbers, embedded as `x * w + b`, and not tokens.
    pair: whether there are two texts, which one encoder reads.

  Raises:
    ConfigError: for a setting that an encoder can't have.
  """

  config: TransformerConfig
  num_classes: int
  real_inputs: bool = False
  pair: bool = False

  def __post_init__(self):
    if self.config is not None:
      self._check()
    super().__post_init__()

  def _check(self):
    c = self.config
    if not c.bidirectional:
      raise ConfigError('TransformerConfig.bidirectional', False, 'True for a classifier')
    if c.window_len > c.block_len:
      raise ConfigError(
        'TransformerConfig.window_len',
        c.window_len,
        f'at most TransformerConfig.block_len = {c.block_len}, as a query of an encoder sees the '
        'positions of its block and of those beside it apart from the rest',
      )
    if not is_count(self.num_classes):
      raise ConfigError('Classifier.num_classes', self.num_classes, 'a whole number of at least 1')
    for sublayer in sublayers.of_layer(c):
      if not sublayer.mixer.ENCODES:
        raise ConfigError(
          f'TransformerConfig.sublayers: {type(sublayer.mixer).__name__} can be in no encoder, as '
          'its positions see no later ones; one that obeys TransformerConfig.bidirectional says so '
          'with ENCODES = True.'
        )

  @property
  def scan_layers(self) -> bool:
    """Whether layers are stacked; T5X asks its modules."""
    return self.config.scan_layers

  def example_inputs(self, batch_size: int) -> tuple[jax.Array, ...]:
    """What to initialize the parameters with, which depend on no shape."""
    inputs = jnp.zeros([batch_size, 1], jnp.float32 if self.real_inputs else jnp.int32)
    lengths = jnp.ones([batch_size], jnp.int32)
    return (inputs, lengths) * (2 if self.pair else 1)

  @nn.compact
  def __call__(
    self,
    inputs: jax.Array,
    lengths: jax.Array,
    inputs2: jax.Array | None = None,
    lengths2: jax.Array | None = None,
    *,
    example_ids: jax.Array | None = None,
    num_examples: int | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, LayerAux]:
    """Classifies.

    Args:
      inputs: [B, T] int32 tokens, or float32 numbers.
      lengths: [B] int32, how many of them there are; what comes after changes nothing.
      inputs2: of two texts, the second, [B, T].
      lengths2: likewise, [B].
      example_ids: [B] int32, place of each example in the global batch; None means 0 to B - 1.
      num_examples: of the global batch; None means B.
      deterministic: False applies dropout, with rngs 'dropout' and 'sequence_dropout'.

    Returns:
      Logits [B, classes] float32, and for each sublayer of a layer its losses and metrics, every
      leaf [layers].
    """
    ids = jnp.arange(len(inputs)) if example_ids is None else example_ids
    number = len(inputs) if num_examples is None else num_examples
    if self.pair:
      # Neighbours, so that the rows stay where they are on a mesh.
      inputs, lengths = _alternate(inputs, inputs2), _alternate(lengths, lengths2)
      ids, number = _alternate(2 * ids, 2 * ids + 1), 2 * number
    means, aux = self._encode(inputs, lengths, ids, number, deterministic)
    if self.pair:
      a, b = means[::2], means[1::2]
      means = jnp.concatenate([a, b, a * b, a - b], axis=-1)
    return self._head(means), aux

  def _encode(
    self,
    inputs: jax.Array,
    lengths: jax.Array,
    example_ids: jax.Array,
    num_examples: int,
    deterministic: bool,
  ) -> tuple[jax.Array, LayerAux]:
    """The mean of each sequence's positions, [B, D] float32."""
    c = self.config
    mask = (jnp.arange(inputs.shape[1]) < lengths[:, None]).astype(jnp.float32)
    position = jnp.zeros(lengths.shape, jnp.int32)
    embed = NumberEmbedding if self.real_inputs else Embedding
    x = embed_positions(c, embed(c, name='token_embedder')(inputs), position)
    call = Call(position, mask, example_ids, None, None, jnp.int32(num_examples))
    x, _, aux = run_layers(c, x, None, call, deterministic)
    if c.final_norm:
      x = RMSNorm(name='final_norm')(x)
    total = jnp.einsum('BTD,BT->BD', x.astype(jnp.float32), mask)
    return total / jnp.maximum(lengths, 1)[:, None], aux

  def _head(self, x: jax.Array) -> jax.Array:
    """[B, D or 4D] to logits [B, classes], in float32."""
    c = self.config
    width = c.num_heads * c.value_width
    hidden = Einsum('BD,DV->BV', (x.shape[-1], width), ('embed', 'mlp'), use_bias=True, name='head')
    x = with_sharding_constraint(jax.nn.gelu(hidden(x)), ('batch', 'mlp'))
    shape, axes = (width, self.num_classes), ('mlp', 'classes')
    return Einsum('BV,VC->BC', shape, axes, use_bias=True, name='logits')(x)


class NumberEmbedding(nn.Module):
  """Real numbers as `x * w + b`, both N(0, 1): with b, a norm of it still tells x."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, numbers: jax.Array) -> jax.Array:
    """[B, T] float32 to [B, T, D]."""
    w, b = (
      nn_partitioning.param_with_axes(
        name, initializers.normal(1.0), (self.config.emb_dim,), jnp.float32, axes=('embed',)
      )
      for name in ('scale', 'bias')
    )
    return (numbers[..., None] * w + b).astype(self.config.dtype)


def _alternate(a: jax.Array, b: jax.Array | None) -> jax.Array:
  """[B, ...] of each to [2B, ...]: a row of the one, a row of the other."""
  assert b is not None
  return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
