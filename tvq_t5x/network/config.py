"""Hyperparameters of the model.

Letters, as in the docs: B batch, T sequence length, L block length, R = T/L blocks, M window
length, N key/value heads, G query heads per key/value head, H = N G query heads, D model width, K
key width per head, V value width per head, S codes per head, W vocabulary.
"""

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from tvq_t5x.common.errors import ConfigError, is_count


class HeadType(enum.StrEnum):
  """Kind of attention sublayer."""

  GATED = 'gated'  # SHGA when num_heads = 1: two gated attention sublayers a layer.
  MHA = 'mha'  # H key/value heads, then an MLP sublayer of width 4D.
  MQA = 'mqa'  # One key/value head, then an MLP sublayer of width 5D.


class AttentionType(enum.StrEnum):
  """What the queries attend to."""

  VQ = 'vq'  # Vector-quantized keys, linear in T.
  QUADRATIC = 'quadratic'  # Unquantized keys, full causal attention: the baseline.


class Sublayer(enum.StrEnum):
  """What a layer may consist of, besides mixers of a user's own."""

  VQ = 'vq'  # Attention over vector-quantized keys.
  QUADRATIC = 'quadratic'  # Attention over unquantized keys, the baseline.
  MLP = 'mlp'
  LONGVQ = 'longvq'  # Gated attention with a state-space layer inside.


class Activation(enum.StrEnum):
  """Of an MLP sublayer."""

  SQUARED_RELU = 'squared_relu'
  SILU = 'silu'


class Reduction(enum.StrEnum):
  """How the compressed cache of every block is computed from the blocks before it."""

  AUTO = 'auto'  # Serial on CPU; on TPU, unrolled for up to 32 blocks of all rows; else matmul.
  SERIAL = 'serial'  # One scan over blocks, attention included: least memory.
  # A scan over groups of up to 64 blocks (on CPU 8) that are computed at once, with their caches.
  UNROLLED = 'unrolled'  # One cache after the other, as many operations as blocks.
  MATMUL = 'matmul'  # Product with a triangular matrix of blocks by blocks.
  ASSOCIATIVE = 'associative'  # Parallel prefix in logarithmically many steps.


class Remat(enum.StrEnum):
  """What the backward pass recomputes instead of keeping it from the forward pass."""

  NONE = 'none'
  ATTENTION = 'attention'  # Attention scores and weights only.
  LAYER = 'layer'  # Everything inside a layer but what is small.


_ENUMS = {
  'head_type': HeadType,
  'attention_type': AttentionType,
  'mlp_activation': Activation,
  'reduction': Reduction,
  'remat': Remat,
}
# Positive integers, and what is more than any machine has room for.
_MOST = {
  **dict.fromkeys(
    ('emb_dim', 'num_heads', 'key_dim', 'value_dim', 'mlp_dim', 'num_codes'), 1_000_000
  ),
  **dict.fromkeys(('block_len', 'window_len', 'kv_cache_len'), 1_000_000_000),
  'vocab_size': 100_000_000,
  'num_layers': 1000,
}
_OPTIONAL = frozenset({'value_dim', 'mlp_dim'})
# A replaced code counts as used twice as much as the share below which it was replaced.
MOST_REPLACED = 0.5
_RATES = ('sinusoid_dropout_rate', 'residual_dropout_rate', 'layer_drop_rate')


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Hyperparameters of `Transformer` (paper, Table 10 and section 5.1).

  Attributes:
    vocab_size: W, ids of the vocabulary (for SentencePiece and bytes, extra ids included).
    emb_dim: D, width of the residual stream.
    num_heads: H, query heads. The paper's single-head gated attention has 1.
    key_dim: K, width of a query or key head.
    value_dim: V, width of a value head: 2D for SHGA; None means 2D / H (gated) or K (MHA, MQA).
    num_layers: layers; each consists of the same sublayers.
    num_codes: S, codebook size per key head.
    block_len: L, positions processed together. Changes speed and no value; only keys of a
      block and of its window get gradients, so it changes which do.
    mlp_dim: F, width of an MLP sublayer; None means 5D for MQA, else 4D.
    mlp_activation: see `Activation`.
    window_len: M, positions before a block that are attended uncompressed.
    head_type: see `HeadType`.
    attention_type: see `AttentionType`.
    sublayers: those of a layer in order, each a name of `Sublayer` or a `mixers.Mixer` class (in
      gin, '@my_module.MyMixer'). None means those of head_type and attention_type: two of
      attention_type where it is gated, else one and an MLP.
    bidirectional: whether all positions of a sequence attend to all, as in an encoder. Keys have
      the position term up to M positions before and after a query, as far as they are in its block
      or one beside it: L should be at least M.
    kv_cache_len: C, positions before a segment whose keys and values 'quadratic' attention
      remembers; it attends to no others.
    reduction: see `Reduction`. Changes speed and memory, never values.
    compressed_cache: whether keys older than the window are attended, compressed by code.
    grad_through_cache: whether a block passes gradient to the blocks before it.
    absolute_positions: whether scaled sinusoids are added to the embeddings.
    max_wavelength: of all sinusoids, in positions (`pe_lam`).
    sinusoid_dropout_rate: on the sinusoids before their projection (`p_dropsin`).
    residual_dropout_rate: on a sublayer's output (`p_dropres`).
    layer_drop_rate: drops a sublayer's residual branch for a whole example (`p_droplyr`).
    tied_embeddings: whether the output projection is the embedding table (`e_tie`).
    final_norm: whether the last residual stream is normalized (`e_preln`).
    logit_scale: multiplies the logits, bias included (`e_scale`).
    commit_weight: beta, weight of the commitment loss.
    ema_decay: gamma, decay of the codebook statistics per parameter update.
    codes_from_keys: whether the codebook starts from keys of the first update, in place of normal
      random numbers. Changes nothing of a codebook that has started.
    replace_below: codes used less than this share of their fair part are set to keys of the update;
      0 means never.
    scan_layers: compile one layer and scan it (parameters are stacked on a `layers` axis).
    unroll_layers: whether a training step has a program of its own for each of the layers, whose
      parameters `scan_layers` stacks: faster on TPU, several times as long to compile. Changes no
      value.
    remat: see `Remat`.
    dtype: of activations. Parameters, logits and softmax statistics are float32.
  """

  vocab_size: int
  emb_dim: int
  key_dim: int
  num_layers: int
  num_codes: int
  block_len: int
  window_len: int
  num_heads: int = 1
  value_dim: int | None = None
  head_type: HeadType = HeadType.GATED
  attention_type: AttentionType = AttentionType.VQ
  sublayers: tuple[str | Callable[..., Any], ...] | None = None
  bidirectional: bool = False
  kv_cache_len: int = 2048
  mlp_dim: int | None = None
  mlp_activation: Activation = Activation.SQUARED_RELU
  reduction: Reduction = Reduction.AUTO
  compressed_cache: bool = True
  grad_through_cache: bool = True
  absolute_positions: bool = False
  max_wavelength: float = 1e5
  sinusoid_dropout_rate: float = 0.0
  residual_dropout_rate: float = 0.0
  layer_drop_rate: float = 0.0
  tied_embeddings: bool = False
  final_norm: bool = False
  logit_scale: float = 1.0
  commit_weight: float = 1e-4
  ema_decay: float = 0.99
  codes_from_keys: bool = False
  replace_below: float = 0.0
  scan_layers: bool = True
  unroll_layers: bool = False
  remat: Remat = Remat.ATTENTION
  dtype: Any = jnp.float32

  def __post_init__(self):
    for name, kind in _ENUMS.items():
      value = getattr(self, name)
      try:
        object.__setattr__(self, name, kind(value))
      except ValueError:
        accepted = ', '.join(repr(member.value) for member in kind)
        raise _error(name, value, f'one of {accepted}') from None
    try:
      object.__setattr__(self, 'dtype', jnp.dtype(self.dtype))
    except TypeError:
      raise _error('dtype', self.dtype, "'float32' or 'bfloat16'") from None
    if self.dtype not in (jnp.float32, jnp.bfloat16):
      raise _error('dtype', str(self.dtype), "'float32' or 'bfloat16'")
    self._check_sublayers()
    for name, most in _MOST.items():
      value = getattr(self, name)
      if value is None and name in _OPTIONAL:
        continue
      if not is_count(value) or value > most:
        raise _error(name, value, f'a positive integer of at most {most:,}')
    for name in _RATES:
      if not 0.0 <= getattr(self, name) < 1.0:
        raise _error(name, getattr(self, name), 'a rate in [0, 1)')
    if not 0.0 <= self.ema_decay < 1.0:
      raise _error('ema_decay', self.ema_decay, 'a decay in [0, 1)')
    if not 0.0 <= self.replace_below <= MOST_REPLACED:
      raise _error('replace_below', self.replace_below, f'a share in [0, {MOST_REPLACED}]')
    for name in ('compressed_cache', 'grad_through_cache') if self.bidirectional else ():
      if not getattr(self, name):
        raise _error(name, False, 'True, as an encoder (bidirectional = True) has no other')
    if self.emb_dim % 2:
      raise _error('emb_dim', self.emb_dim, 'an even width, for the sinusoids')

  def _check_sublayers(self):
    if self.sublayers is None:
      return
    names, sublayers = list(map(str, Sublayer)), self.sublayers
    accepted = f'a list of {", ".join(map(repr, names))} or mixer classes (@my_module.MyMixer)'
    if isinstance(sublayers, str) or not isinstance(sublayers, Sequence) or not sublayers:
      raise _error('sublayers', sublayers, accepted)
    for kind in sublayers:
      if kind not in names if isinstance(kind, str) else not callable(kind):
        raise _error('sublayers', sublayers, accepted)
    if self.attention_type != AttentionType.VQ:
      raise _error('attention_type', self.attention_type.value, "'vq', as sublayers are given")
    object.__setattr__(self, 'sublayers', tuple(sublayers))

  @property
  def layer_sublayers(self) -> tuple[str | Callable[..., Any], ...]:
    """The sublayers of each layer, in order."""
    if self.sublayers is not None:
      return self.sublayers
    return standard_sublayers(self.head_type, self.attention_type)

  @property
  def value_width(self) -> int:
    """V: `value_dim`, or its default."""
    if self.value_dim is not None:
      return self.value_dim
    gated = self.head_type == HeadType.GATED
    return 2 * self.emb_dim // self.num_heads if gated else self.key_dim

  @property
  def num_kv_heads(self) -> int:
    """N, heads of keys, values and codebooks."""
    return 1 if self.head_type == HeadType.MQA else self.num_heads

  @property
  def queries_per_kv_head(self) -> int:
    """G, query heads that share a key/value head."""
    return self.num_heads // self.num_kv_heads

  @property
  def mlp_width(self) -> int:
    """F: `mlp_dim`, or its default."""
    if self.mlp_dim is not None:
      return self.mlp_dim
    return self.emb_dim * (5 if self.head_type == HeadType.MQA else 4)

  @property
  def value_axis(self) -> str:
    """Logical axis of V: the wide values of a single gated head are sharded like an MLP's width."""
    single = self.head_type == HeadType.GATED and self.num_heads == 1
    return 'mlp' if single else 'kv'

  @staticmethod
  def heads_axis(num_heads: int) -> str:
    """Logical axis of heads: 'heads' is sharded, a single head has nothing to shard."""
    return 'heads' if num_heads > 1 else 'single_head'

  def num_blocks(self, length: int) -> int:
    """R for a segment of `length` tokens, which is one block when shorter than L.

    Raises:
      ConfigError: if L does not divide the length.
    """
    block_len = min(self.block_len, length)
    if length % block_len:
      raise ConfigError(
        f'A segment of {length} tokens is not a whole number of blocks: '
        f'TransformerConfig.block_len = {self.block_len} must divide it (or exceed it).'
      )
    return length // block_len


def standard_sublayers(head_type: str, attention_type: str) -> tuple[str, str]:
  """The sublayers that two settings stand for."""
  return (attention_type, attention_type if head_type == HeadType.GATED else Sublayer.MLP)


def _error(name: str, value: Any, accepted: str) -> ConfigError:
  return ConfigError(f'TransformerConfig.{name} = {value!r} is not accepted: give {accepted}.')
