"""The MLP sublayer."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from tvq_t5x.network.config import Activation
from tvq_t5x.network.layers import Einsum, RMSNorm, silu, with_sharding_constraint
from tvq_t5x.network.mixers import Aux, Call, Mixer, State

_ACTIVATIONS = {
  Activation.SQUARED_RELU: lambda x: jnp.square(jax.nn.relu(x)),
  Activation.SILU: silu,
}


class Mlp(Mixer):
  """RMSNorm, then two projections with an activation between them, without biases."""

  KIND: ClassVar[str] = 'mlp'
  ENCODES: ClassVar[bool] = True

  @nn.compact
  def __call__(self, x: jax.Array, state: State, call: Call) -> tuple[jax.Array, State, Aux]:
    """[B, T, D] to the residual branch [B, T, D]; see `Mixer`."""
    del state, call
    c = self.config
    shape = (c.emb_dim, c.mlp_width)
    activate = _ACTIVATIONS[c.mlp_activation]
    y = RMSNorm(name='norm')(x)
    y = Einsum('BTD,DF->BTF', shape, ('embed', 'mlp'), dtype=c.dtype, name='wi')(y)
    y = with_sharding_constraint(activate(y), ('batch', 'length', 'mlp'))
    y = Einsum('BTF,FD->BTD', shape[::-1], ('mlp', 'embed'), dtype=c.dtype, name='wo')(y)
    return y, (), {}

  @property
  def shares_sequences(self) -> bool:
    """It mixes no positions."""
    return True

  @classmethod
  def param_name(cls, index: int) -> str:
    """'mlp' for the first: most layers have one."""
    return cls.KIND if index == 0 else f'{cls.KIND}_{index}'
