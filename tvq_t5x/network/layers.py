"""Building blocks with logical axis names: projections, normalization, dropout, embeddings."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from tvq_t5x.network import sequence, xla
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.gathering import gather

with_sharding_constraint = sequence.constrain
NORM_EPSILON = 1e-6

# Names of flax's `rngs`. Masks drawn from the second stay the same for all updates of a sequence.
DROPOUT = 'dropout'
SEQUENCE_DROPOUT = 'sequence_dropout'

_SAVED, _SMALL = 'saved', 'small'
# What `Remat.ATTENTION` keeps for the backward pass: what went through `save_for_backward`.
SAVE_MARKED = jax.checkpoint_policies.save_only_these_names(_SAVED, _SMALL)
# What `Remat.LAYER` keeps: of that, what takes next to no memory.
SAVE_SMALL = jax.checkpoint_policies.save_only_these_names(_SMALL)


def save_for_backward(x: jax.Array, small: bool = False) -> jax.Array:
  """Identity that marks x as cheaper to keep for the backward pass than to compute again.

  Args:
    x: any array.
    small: whether it is small beside the residual stream [B, T, D].

  Returns:
    x.
  """
  return checkpoint_name(x, _SMALL if small else _SAVED)


def residual_stream(x: jax.Array) -> jax.Array:
  """The residual stream [B, T, D], laid out as every sublayer takes it."""
  x = with_sharding_constraint(x, ('batch', 'length', 'embed'))
  # Else XLA may keep it transposed for the backward pass, and copy it there.
  return sequence.row_major(x) if xla.in_training() else x


def rms_normalize(x: jax.Array) -> jax.Array:
  """`x / sqrt(mean(x^2) + eps)` over the last axis, computed in float32, in the dtype of x."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + NORM_EPSILON)
  return y.astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
  """`x sigmoid(x)` in the dtype of x; of a narrower one than float32, rounded at the end only."""
  return jax.nn.silu(x) if x.dtype == jnp.float32 else _silu_in_float32(x)


@jax.custom_jvp
def _silu_in_float32(x):
  y = x.astype(jnp.float32)
  return (y * _sigmoid(y)).astype(x.dtype)


@_silu_in_float32.defjvp
def _silu_jvp(primals, tangents):
  (x,), (x_dot,) = primals, tangents
  y = x.astype(jnp.float32)
  sigmoid = _sigmoid(y)
  slope = sigmoid * (1.0 + y * (1.0 - sigmoid))
  return (y * sigmoid).astype(x.dtype), x_dot * slope.astype(x.dtype)


def _sigmoid(x):
  """By tanh, which a TPU takes in one step, where a quotient of exponentials has several."""
  return 0.5 + 0.5 * jnp.tanh(0.5 * x)


class RMSNorm(nn.Module):
  """RMS normalization with learned gain and bias."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] to [..., D]."""
    shape = (x.shape[-1],)
    scale = nn_partitioning.param_with_axes(
      'scale', initializers.ones, shape, jnp.float32, axes=('embed',)
    )
    bias = nn_partitioning.param_with_axes(
      'bias', initializers.zeros, shape, jnp.float32, axes=('embed',)
    )
    return xla.scale_and_shift(rms_normalize(x), scale.astype(x.dtype), bias.astype(x.dtype))


class Einsum(nn.Module):
  """A projection: `einsum(equation, x, kernel)`, and a bias where asked for.

  Attributes:
    equation: such as 'BTD,DNK->BTNK'.
    shape: of the kernel.
    axes: logical axis names of the kernel.
    num_in_axes: how many leading axes of the kernel are its fan-in.
    dtype: of the product.
    use_bias: whether a bias is added, with the axes of the kernel that are not its fan-in.
  """

  equation: str
  shape: Sequence[int]
  axes: Sequence[str]
  num_in_axes: int = 1
  dtype: Any = jnp.float32
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies the projection."""
    axes = tuple(range(len(self.shape)))
    kernel_init = initializers.variance_scaling(
      1.0, 'fan_in', 'normal', in_axis=axes[: self.num_in_axes], out_axis=axes[self.num_in_axes :]
    )
    kernel = nn_partitioning.param_with_axes(
      'kernel', kernel_init, tuple(self.shape), jnp.float32, axes=tuple(self.axes)
    )
    kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
    if xla.in_training():
      y = self._in_training(x, kernel)
    else:
      y = xla.einsum_of_few_rows(self.equation, x, kernel)
    if not self.use_bias:
      return y
    bias = nn_partitioning.param_with_axes(
      'bias',
      initializers.zeros,
      tuple(self.shape)[self.num_in_axes :],
      jnp.float32,
      axes=tuple(self.axes)[self.num_in_axes :],
    )
    return y + bias.astype(self.dtype)

  def _in_training(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    left, right, out = xla.operands(self.equation)
    sizes = dict(zip(right, kernel.shape, strict=True))
    # With the axis of a single head, the gradient of a kernel that devices share is put in another
    # order before its sum. On CPU that costs nothing, and the order of sums stays what it is.
    single = {c for c in right if sizes[c] == 1 and xla.platform() != 'cpu'}
    axes = tuple(axis for c, axis in zip(right, self.axes, strict=True) if c not in single)

    def kept(letters):
      return ''.join(c for c in letters if c not in single)

    def places(letters):
      return [i for i, c in enumerate(letters) if c in single]

    kernel = gather(axes, kernel.squeeze(places(right)))
    equation = f'{kept(left)},{kept(right)}->{kept(out)}'
    y = xla.einsum(equation, x.squeeze(places(left)), kernel)
    return jnp.expand_dims(y, places(out))


def dropout(
  rng: jax.Array,
  x: jax.Array,
  rate: float,
  example_ids: jax.Array,
  position: jax.Array | None = None,
) -> jax.Array:
  """Dropout whose mask depends on examples and positions, not on their place in a part of a batch.

  Args:
    rng: key, folded with an example's id, and with a position.
    x: [B, T, D].
    rate: probability to drop; that of an entry is rounded to 1 / 65,536.
    example_ids: [B] int32, place of each example in the global batch.
    position: [B] int32, of the first of the T positions of each example; None keeps or drops an
      example as a whole (LayerDrop).

  Returns:
    [B, T, D], kept entries scaled by `1 / (1 - rate)`.
  """
  # One of T5X's keys is an array of two numbers, so what a key is for is counted.
  keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(example_ids)  # [B]
  if position is None:
    # Of a Python number, JAX with numbers of 64 bits makes other draws.
    draw = functools.partial(jax.random.bernoulli, p=jnp.float32(1.0 - rate), shape=(1, 1))
    kept = jax.vmap(draw)(keys)
    return kept.astype(x.dtype) * x / (1.0 - rate)  # No mask of all positions is kept.
  positions = position[:, None] + jnp.arange(x.shape[1])
  keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, positions)  # [B, T]
  kept = [half >= round(rate * 0x10000) for half in _halves(keys, x.shape[-1])]
  if xla.platform() != 'cpu':
    # Masks are drawn once, not again within each product before and after them.
    kept, x = jax.lax.optimization_barrier((kept, x))
  # On TPU, padded pieces are joined where they are read; concatenated, they would be copied first.
  width, columns = x.shape[-1], kept[0].shape[-1]
  starts = [i * columns for i in range(len(kept))]
  kept = [
    jax.lax.pad(piece, False, [(0, 0, 0), (0, 0, 0), (start, width - start - columns, 0)])
    for start, piece in zip(starts, kept, strict=True)
  ]
  kept = functools.reduce(jnp.logical_or, kept)
  return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))


def _halves(keys: jax.Array, width: int) -> list[jax.Array]:
  """16 random bits for each of so many columns, in pieces [B, T, C], of keys [B, T].

  A key that is folded with the number of a column is 64 bits of its own. Pieces are of full
  registers of a TPU, 128 columns each, where 4, 3 or 2 can be.
  """
  pieces = next((n for n in (4, 3, 2) if width % (n * 128) == 0), 4)
  columns = jnp.arange(-(-width // pieces))
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = jax.vmap(jax.vmap(fold, (0, None)), (0, None))(keys, columns)
  words = jax.random.key_data(keys)  # [B, T, C, 2 or more]
  halves = [half for i in (0, 1) for half in (words[..., i] >> 16, words[..., i] & 0xFFFF)]
  return halves[:pieces]


class Embedding(nn.Module):
  """Token embeddings, N(0, 1), shared with the output projection when tied."""

  config: TransformerConfig

  def setup(self):
    """Creates the table [W, D]."""
    c = self.config
    self.embedding = nn_partitioning.param_with_axes(
      'embedding',
      initializers.normal(1.0),
      (c.vocab_size, c.emb_dim),
      jnp.float32,
      axes=('vocab', 'embed'),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """[B, T] int32 to [B, T, D]."""
    return self.embedding[tokens].astype(self.config.dtype)

  def attend(self, x: jax.Array) -> jax.Array:
    """Logits [B, T, W] float32, without bias, of features [B, T, D]."""
    table = gather(('vocab', 'embed'), self.embedding) if xla.in_training() else self.embedding
    return jnp.einsum('BTD,WD->BTW', x.astype(jnp.float32), table)


class Logits(nn.Module):
  """Output projection in float32, tied or its own, with bias, times `logit_scale`."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: jax.Array, embedding: Embedding | None) -> jax.Array:
    """[B, T, D] to [B, T, W] float32; `embedding` is the table to share when tied."""
    c = self.config
    if embedding is None:
      project = Einsum('BTD,DW->BTW', (c.emb_dim, c.vocab_size), ('embed', 'vocab'), name='dense')
      logits = project(x)
    else:
      logits = embedding.attend(x)
    bias = nn_partitioning.param_with_axes(
      'bias', initializers.zeros, (c.vocab_size,), jnp.float32, axes=('vocab',)
    )
    return (xla.gradient_once(logits) + bias) * c.logit_scale
