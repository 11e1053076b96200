"""A token mixer of one's own, in a small model that trains for some seconds.

  python examples/own_mixer.py [MODEL_DIR [SETTING ...]]

docs/extending.md explains what a mixer is; own_mixer.gin puts this one into the layers.
"""

import sys

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import tvq_t5x
from tvq_t5x.network.layers import Einsum, RMSNorm
from tvq_t5x.network.mixers import Mixer


class Shift(Mixer):
  """Adds a gated projection of the position before: attention has no need to look there."""

  KIND = 'shift'

  @nn.compact
  def __call__(self, x, state, call):
    """From x [B, T, D] and the last position [B, D] to the branch [B, T, D] and the next state."""
    d, axes = self.config.emb_dim, ('embed', 'mlp')  # Logical axes, for devices that share these.
    y = RMSNorm(name='norm')(x)
    gate, value = (Einsum('BTD,DF->BTF', (d, d), axes, name=n)(y) for n in ('gate', 'value'))
    state = jnp.zeros([len(x), d]) if state is None else state
    before = jnp.concatenate([state[:, None], value], axis=1)  # [B, T + 1, D]
    # Rows of a batch may have fewer tokens than T: then `lengths` [B] says how many.
    last = jnp.full([len(x)], x.shape[1]) if call.lengths is None else call.lengths
    state = jnp.take_along_axis(before, last[:, None, None], axis=1)[:, 0]
    out = Einsum('BTF,FD->BTD', (d, d), axes[::-1], name='out')
    return out(nn.silu(gate) * before[:, :-1]), state, {}

  def init_state(self, batch_size):
    """Before the first token there is nothing."""
    return jnp.zeros([batch_size, self.config.emb_dim])

  def state_axes(self):
    """The state has a row for each sequence."""
    return PartitionSpec('batch', None)


def main(model_dir: str = 'runs/own_mixer', *settings: str) -> None:
  """Trains, and shows what the layers are and what they learned."""
  run = tvq_t5x.train_model(
    ['gin/kjv_tiny.gin', 'examples/own_mixer.gin'], model_dir, list(settings)
  )
  print(run)
  lm = tvq_t5x.load(run, modules=['own_mixer'])
  print('sublayers of a layer:', ', '.join(lm.loaded.params['layers_0']))
  print(lm.score('In the beginning God created the heaven and the earth.'))


if __name__ == '__main__':
  main(*sys.argv[1:])
