"""What the network computes on the way to its predictions, for each token of a text."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvq_t5x.network.decoding import GenerationState
from tvq_t5x.network.transformer import Transformer


class Inspection(NamedTuple):
  """What the network computes of a text.

  At place i the input is the token before token i of the text, EOS at the beginning of a document,
  and what is predicted is token i.

  Attributes:
    tokens: [n] int32, of the text.
    logits: [n, W] float32, whose softmax is the distribution of token i.
    hidden: [layers, n, D], the residual stream after each layer.
    codes: by the name of the sublayer, such as 'layers_0/attention_1', [n, N] int32: the code that
      the key of the input has in each of N heads of keys.
  """

  tokens: np.ndarray
  logits: np.ndarray
  hidden: np.ndarray
  codes: dict[str, np.ndarray]

  def __repr__(self) -> str:
    shapes = ', '.join(f'{name} {list(getattr(self, name).shape)}' for name in ('logits', 'hidden'))
    return f'Inspection({len(self.tokens):,} tokens: {shapes}, codes of {", ".join(self.codes)})'


def inspect(
  module: Transformer, params: Any, state: GenerationState, tokens: np.ndarray
) -> Inspection:
  """Reads a text in one forward pass.

  Args:
    module: the network.
    params: of the module.
    state: of one sequence, what came before; it remains as it is.
    tokens: [n] int32.
  """
  number, block = len(tokens), module.config.block_len
  # [1, T]: whole blocks, so that few lengths are compiled for. No place sees what comes after it.
  inputs = jnp.concatenate([state.token, jnp.asarray(tokens[:-1], jnp.int32)])[None, :number]
  inputs = jnp.pad(inputs, [(0, 0), (0, -number % block)])

  @jax.jit
  def run(params: Any, inputs: jax.Array, decoder: Any) -> Any:
    (logits, _, _), found = module.apply(
      {'params': params}, inputs, decoder, mutable=['intermediates']
    )  # pyright: ignore[reportGeneralTypeIssues]
    return logits, found['intermediates']

  logits, found = jax.device_get(run(params, inputs, state.decoder))
  layers = _layers(found, module.config.num_layers)
  return Inspection(
    tokens,
    logits[0, :number],
    np.stack([layer['output'][0][0, :number] for layer in layers.values()]),
    {
      f'{name}/{sublayer}': said['codes'][0][0, :number]
      for name, layer in layers.items()
      for sublayer, said in layer.items()
      if isinstance(said, Mapping) and 'codes' in said
    },
  )


def _layers(found: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
  """What each layer said, also where they are stacked."""
  names = [f'layers_{i}' for i in range(num_layers)]
  if 'layers' not in found:
    return {name: found[name] for name in names}
  return {name: jax.tree.map(lambda x, i=i: x[i], found['layers']) for i, name in enumerate(names)}
