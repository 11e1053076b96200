"""What the stack knows of a sublayer: a mixer, its state, and what it has to say to the loss.

A new mixer is one file: a subclass of `Mixer`, named in `TransformerConfig.sublayers`. The letters
of shapes are those of `config`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax

from tvq_t5x.network.config import TransformerConfig

# A tree of arrays, each with a batch axis; () of a mixer that remembers nothing.
State = Any


class Call(NamedTuple):
  """What every sublayer of one forward call is told."""

  position: jax.Array  # [B] int32, of the segment's first token
  loss_mask: jax.Array  # [B, T] float32, 0 where a position counts in no loss and no statistic
  example_ids: jax.Array  # [B] int32, place in the global batch: selects dropout masks
  lengths: jax.Array | None  # [B] int32, how many tokens the state takes in; None means all
  step: jax.Array | None  # [] int32, tokens since `for_tokens`; None elsewhere
  num_examples: jax.Array | None = None  # [] int32, of the global batch; None means B


class Loss(NamedTuple):
  """A loss of a mixer, added to the cross entropy of the segment's tokens; float32 scalars."""

  total: jax.Array  # Summed over positions that count; told as a metric, a token.
  weight: jax.Array | float


class Statistics(NamedTuple):
  """A zero whose gradient brings statistics of the batch to the optimizer; a float32 scalar."""

  zero: jax.Array


class Ratio(NamedTuple):
  """A metric of one sublayer, the ratio of two sums over a batch; float32 scalars."""

  total: jax.Array
  count: jax.Array | float


Aux = Mapping[str, Loss | Statistics | Ratio]


class Mixer(nn.Module):
  """A sublayer, without its residual connection.

  The stack creates it as `mixer(config=..., deterministic=..., name=...)`; what else it needs are
  attributes with defaults, which gin may set.

  Attributes:
    config: of the whole network.
    deterministic: whether there is no dropout.
  """

  config: TransformerConfig
  deterministic: bool = True

  # Of its parameters, see `param_name`; also in the names of its metrics.
  KIND: ClassVar[str] = 'mixer'
  # Whether it marks with `save_for_backward` what `Remat.ATTENTION` should keep.
  SAVES_MARKED: ClassVar[bool] = False
  # Attributes that change speed and memory only: a checkpoint goes on with others.
  SPEED_ONLY: ClassVar[frozenset[str]] = frozenset()
  # Whether it obeys `TransformerConfig.bidirectional`, without which it can't be in an encoder:
  # each position sees all of a sequence that have a loss_mask, and the state is ().
  ENCODES: ClassVar[bool] = False

  def __call__(self, x: jax.Array, state: State | None, call: Call) -> tuple[jax.Array, State, Aux]:
    """Mixes the positions of a segment.

    Args:
      x: [B, T, D], the residual stream.
      state: of the positions before the segment; None at the start of the sequences, which is the
        same as `init_state`. While tokens are generated, from `for_tokens`; T is 1 then.
      call: what the whole stack is told.

    Returns:
      The residual branch [B, T, D], the state after the segment, and losses and metrics by name.
    """
    raise NotImplementedError

  @property
  def shares_sequences(self) -> bool:
    """Whether devices can share sequences in it: what mixes positions is in `sequence.on_parts`."""
    return False

  @nn.nowrap
  def init_state(self, batch_size: int) -> State:
    """The state before the first token of B sequences."""
    del batch_size
    return ()

  @nn.nowrap
  def state_axes(self) -> State:
    """Logical axis names of the state: a PartitionSpec, with 'batch' in it, for each array."""
    return ()

  @nn.nowrap
  def for_tokens(self, state: State) -> State:
    """The same state in the form that takes one token after the other; it may be any tree."""
    return state

  @nn.nowrap
  def from_tokens(self, state: State, steps: jax.Array) -> State:
    """The inverse of `for_tokens`, after `steps` ([] int32) tokens."""
    del steps
    return state

  @classmethod
  def param_name(cls, index: int) -> str:
    """Name of the parameters of the layer's mixer of this kind, counted from 0."""
    return f'{cls.KIND}_{index}'
