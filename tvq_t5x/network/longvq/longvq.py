"""The LongVQ block: a state-space layer inside a gated attention to quantized keys.

A reconstruction: the paper (arXiv 2404.11163) says which parts there are, and leaves open how they
are put together. What is open is as in Mega (arXiv 2209.10655) and S4D (arXiv 2206.11893).
"""

import enum
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from jax.nn import initializers
from jax.sharding import PartitionSpec

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network import quadratic
from tvq_t5x.network.attention import Queries, Values
from tvq_t5x.network.config import HeadType
from tvq_t5x.network.layers import (
  Einsum,
  RMSNorm,
  rms_normalize,
  save_for_backward,
  silu,
  with_sharding_constraint,
)
from tvq_t5x.network.longvq.ssm import SSM, Initialization
from tvq_t5x.network.mixers import Aux, Call, Mixer
from tvq_t5x.network.vq import mixer as vq

_ATTENTION = {
  'vq': vq.VQAttention,
  'quadratic': quadratic.QuadraticAttention,
}


class AttentionKind(enum.StrEnum):
  """What the attention of a block attends to."""

  VQ = 'vq'
  QUADRATIC = 'quadratic'
  NONE = 'none'


class LongVQState(NamedTuple):
  """Of the positions before a segment; () in the place of a part that the block lacks."""

  ssm: Any  # [B, D, n, 2] float32
  attention: Any


class LongVQ(Mixer):
  """A gated block; the letters of its parts are those of Mega.

  Of the input X [B, T, D], normalized, `G = silu(SSM(X))`; queries and keys are two affine maps of
  `Z = silu(G Wz)`, values are `silu(X Wv)`. With O the attention's output and the gates
  `r = silu(G Wr)` and `u = sigmoid(G Wu)`, the block is `Y = u h + (1 - u) X` for
  `h = silu(G Wh + (r O) Uh)`. Each projection of G and X has a bias.

  Attributes:
    use_ssm: whether there is a state-space layer; else G is silu of the normalized input.
    attention: see `AttentionKind`; without any, O is 0.
    state_size: N of the state-space layer.
    initialization: of its modes, see `ssm.Initialization`.
    complex_modes: whether they oscillate.
    chunk_len: positions that it convolves at once.
  """

  use_ssm: bool = True
  attention: str = AttentionKind.VQ
  state_size: int = 64
  initialization: str = Initialization.LIN
  complex_modes: bool = True
  chunk_len: int = 1024

  KIND: ClassVar[str] = 'longvq'
  SAVES_MARKED: ClassVar[bool] = True
  SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({'chunk_len'})
  ENCODES: ClassVar[bool] = True

  def __post_init__(self):
    self._check()
    super().__post_init__()

  def _check(self):
    """Refuses attributes that are none.

    Raises:
      ConfigError: naming the attribute.
    """
    for name, kind in (('attention', AttentionKind), ('initialization', Initialization)):
      if getattr(self, name) not in list(kind):
        raise ConfigError(
          f'LongVQ.{name}', getattr(self, name), f'one of {", ".join(map(repr, map(str, kind)))}'
        )
    for name, unit in (('state_size', 2 if self.complex_modes else 1), ('chunk_len', 1)):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1 or value % unit:
        raise ConfigError(f'LongVQ.{name}', value, f'a positive multiple of {unit}')
    if self.attention == AttentionKind.NONE and not self.use_ssm:
      raise ConfigError(
        'LongVQ.use_ssm', False, "True, as attention = 'none' leaves nothing else to mix positions"
      )
    if self.config is not None and self.config.head_type != HeadType.GATED:
      raise ConfigError(
        'TransformerConfig.head_type', self.config.head_type.value, "'gated' with LongVQ"
      )

  @nn.compact
  def __call__(
    self, x: jax.Array, state: LongVQState | None, call: Call
  ) -> tuple[jax.Array, LongVQState, Aux]:
    """[B, T, D] to the residual branch `Y - X` [B, T, D]; see `Mixer`."""
    normed = RMSNorm(name='norm')(x)
    if self.config.bidirectional:
      normed = normed * call.loss_mask[..., None].astype(normed.dtype)
    g, after_ssm = self._filter(normed, state, call)
    h = self._project(g, 'candidate')
    out, after_attention, aux = self._attend(normed, g, state, call)
    if out is not None:
      h = h + out
    u = jax.nn.sigmoid(self._project(g, 'update'))
    branch = u * (silu(h) - x)
    return branch.astype(x.dtype), LongVQState(after_ssm, after_attention), aux

  def _filter(self, x: jax.Array, state: LongVQState | None, call: Call) -> tuple[jax.Array, Any]:
    """G [B, T, D], and the state of the state-space layer."""
    if not self.use_ssm:
      return silu(x), ()
    ssm = SSM(
      self.state_size,
      self.initialization,
      self.complex_modes,
      self.config.bidirectional,
      self.chunk_len,
      name='ssm',
    )
    before = None if state is None or self.config.bidirectional else state.ssm
    y, after = ssm(with_sharding_constraint(x, ('batch', 'length', 'mlp')), before, call.lengths)
    g = save_for_backward(silu(y).astype(self.config.dtype))
    return g, () if self.config.bidirectional else after

  def _attend(
    self, x: jax.Array, g: jax.Array, state: LongVQState | None, call: Call
  ) -> tuple[jax.Array | None, Any, Aux]:
    """The gated output of the attention, projected to [B, T, D]; None without attention."""
    c = self.config
    if self.attention == AttentionKind.NONE:
      return None, (), {}
    queries, keys = self._queries_and_keys(g)
    values = Values(self._heads(x, 'value', c.value_width, c.value_axis), silu)
    args = Queries(queries[:, :, :, None], queries[:, :, :, None]), keys, values
    before = None if state is None else state.attention
    if self.attention == AttentionKind.QUADRATIC:
      out, after, aux = quadratic.attend(*args, self._window_bias(), before, call, c)
    else:
      out, after, aux = vq.attend(*args, self._window_bias(), before, call, self)
    reset = silu(self._heads(g, 'reset', c.value_width, c.value_axis))
    shape = c.num_heads, c.value_width, c.emb_dim
    axes = c.heads_axis(c.num_heads), c.value_axis, 'embed'
    project = Einsum('BTHV,HVD->BTD', shape, axes, 2, dtype=c.dtype, name='out')
    return project(reset * out[:, :, :, 0]), after, aux

  def _queries_and_keys(self, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, T, H, K] each: affine maps of one projection, normalized as those of Transformer-VQ."""
    c = self.config
    shape, axes = (c.num_heads, c.key_dim), (c.heads_axis(c.num_heads), 'kv')
    z = silu(self._heads(g, 'shared', c.key_dim, 'kv'))

    def near_one(key, shape, dtype):
      return 1 + 0.02 * jax.random.normal(key, shape, dtype)

    def affine(name):
      scale, shift = (
        nn_partitioning.param_with_axes(f'{name}_{part}', init, shape, jnp.float32, axes=axes)
        for part, init in (('scale', near_one), ('shift', initializers.zeros))
      )
      return c.key_dim**-0.25 * rms_normalize(scale.astype(z.dtype) * z + shift.astype(z.dtype))

    return affine('query'), affine('key')

  def _window_bias(self) -> jax.Array:
    """What a key's distance adds to its score: [M + 1, H], or both ways [2M + 1, H]."""
    c = self.config
    number = 2 * c.window_len + 1 if c.bidirectional else c.window_len + 1
    bias = nn_partitioning.param_with_axes(
      'window_bias',
      initializers.zeros,
      (c.num_heads, number),
      jnp.float32,
      axes=(c.heads_axis(c.num_heads), 'relpos_buckets'),
    )
    return bias.T

  def _heads(self, x: jax.Array, name: str, width: int, axis: str) -> jax.Array:
    """[B, T, D] to [B, T, H, width]."""
    c = self.config
    shape, axes = (c.emb_dim, c.num_heads, width), ('embed', c.heads_axis(c.num_heads), axis)
    einsum = Einsum('BTD,DHK->BTHK', shape, axes, dtype=c.dtype, use_bias=True, name=name)
    return save_for_backward(einsum(x))

  def _project(self, x: jax.Array, name: str) -> jax.Array:
    """[B, T, D] to [B, T, D]."""
    c = self.config
    shape, axes = (c.emb_dim, c.emb_dim), ('mlp', 'embed')
    einsum = Einsum('BTD,DF->BTF', shape, axes, dtype=c.dtype, use_bias=True, name=name)
    return save_for_backward(einsum(x))

  @property
  def shares_sequences(self) -> bool:
    """As its attention and its state-space layer do."""
    return self.attention != AttentionKind.QUADRATIC

  @nn.nowrap
  def init_state(self, batch_size: int) -> LongVQState:
    """No positions."""
    c, number = self.config, self.state_size // 2 if self.complex_modes else self.state_size
    has_ssm = self.use_ssm and not self.config.bidirectional
    ssm = jnp.zeros([batch_size, c.emb_dim, number, 2]) if has_ssm else ()
    attention = self._attention()
    return LongVQState(ssm, attention.init_state(batch_size) if attention else ())

  @nn.nowrap
  def state_axes(self) -> LongVQState:
    """See `Mixer`."""
    has_ssm = self.use_ssm and not self.config.bidirectional
    ssm = PartitionSpec('batch', 'mlp', None, None) if has_ssm else ()
    attention = self._attention()
    return LongVQState(ssm, attention.state_axes() if attention else ())

  @nn.nowrap
  def for_tokens(self, state: LongVQState) -> LongVQState:
    """The attention's state in the form that takes one token after the other."""
    attention = self._attention()
    return state._replace(attention=attention.for_tokens(state.attention)) if attention else state

  @nn.nowrap
  def from_tokens(self, state: LongVQState, steps: jax.Array) -> LongVQState:
    """The inverse of `for_tokens`."""
    attention = self._attention()
    if not attention:
      return state
    return state._replace(attention=attention.from_tokens(state.attention, steps))

  @nn.nowrap
  def _attention(self) -> Mixer | None:
    """The sublayer whose state the block's attention has."""
    if self.attention == AttentionKind.NONE or self.config.bidirectional:
      return None
    return _ATTENTION[self.attention](self.config, parent=None)
