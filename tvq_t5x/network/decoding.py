"""Reads and writes sequences of any length with a state of constant size.

A `GenerationState` is where B sequences stand. `start` makes one, `read` feeds it given tokens (a
prompt, or a text to score) and `generate` lets the model continue; in any order and any number of
times. All of them are to be compiled: they loop inside, so a program does not grow with the length.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import partitioning as nn_partitioning
from jax.typing import ArrayLike

from tvq_t5x.common import words
from tvq_t5x.common.named_arrays import array_name
from tvq_t5x.common.tokens import EOS, PAD
from tvq_t5x.network import sampling, sublayers
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import with_sharding_constraint
from tvq_t5x.network.mixers import Mixer
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.network.transformer import (
  DecoderState,
  LayerState,
  Transformer,
  batch_axes,
  init_decoder_state,
  stacked,
  unstacked,
)
from tvq_t5x.network.vq.quantizer import codebook_axes

Params = Any


class GenerationState(NamedTuple):
  """B sequences: everything that their next tokens depend on."""

  decoder: DecoderState  # Of all tokens but the last.
  token: jax.Array  # [B] int32, the last token: the next input.

  def __repr__(self) -> str:
    arrays = jax.tree.leaves(self)
    if not all(isinstance(x, jax.Array | np.ndarray) for x in arrays):
      return tuple.__repr__(self)  # Shapes or shardings in their place.
    number = len(self.token)
    size = words.size(sum(x.size * x.dtype.itemsize for x in arrays))
    return f'GenerationState({number} {"sequence" if number == 1 else "sequences"}, {size})'


def start(module: Transformer, batch_size: int) -> GenerationState:
  """The state of B sequences without tokens; EOS stands before the first one."""
  token = jnp.full([batch_size], EOS, jnp.int32)
  return GenerationState(init_decoder_state(module.config, batch_size), token)


def read(
  module: Transformer,
  params: Params,
  state: GenerationState,
  tokens: jax.Array,
  lengths: jax.Array,
) -> tuple[GenerationState, jax.Array, jax.Array]:
  """Continues sequences with given tokens, a block of L at a time.

  Args:
    module: the network.
    params: of the module.
    state: of the sequences so far.
    tokens: [B, P] int32.
    lengths: [B] int32, how many of the P tokens row b has; the rest is ignored.

  Returns:
    The state after each row's tokens, the log-likelihood [B] of each row's tokens, and the nats
    [B, P] of each token, minus its log-likelihood, 0 beyond the row's length. All float32.
  """
  batch_size, length = tokens.shape
  if not length:
    zeros = jnp.zeros([batch_size, 0], jnp.float32)
    return state, jnp.sum(zeros, axis=1), zeros
  block_len = min(module.config.block_len, length)
  num_blocks = -(-length // block_len)

  def to_blocks(x: jax.Array) -> jax.Array:  # [B, P] to [R, B, L]
    x = jnp.pad(x, [(0, 0), (0, num_blocks * block_len - length)])
    return jnp.swapaxes(x.reshape(batch_size, num_blocks, block_len), 0, 1)

  def step(decoder, block):
    inputs, targets, start = block
    given = jnp.clip(lengths - start, 0, block_len)
    logits, decoder = _apply(module, params, inputs, decoder, lengths=given)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return decoder, jnp.where(jnp.arange(block_len) < given[:, None], nats, 0.0)

  # Each token is predicted from the one before it.
  stream = jnp.concatenate([state.token[:, None], tokens.astype(jnp.int32)], axis=1)
  starts = jnp.arange(num_blocks, dtype=jnp.int32) * block_len
  blocks = to_blocks(stream[:, :-1]), to_blocks(stream[:, 1:]), starts
  decoder, nats = jax.lax.scan(step, state.decoder, blocks)
  nats = jnp.swapaxes(nats, 0, 1).reshape(batch_size, -1)[:, :length]
  last = jnp.take_along_axis(stream, lengths[:, None], axis=1)[:, 0]
  return GenerationState(decoder, last), -jnp.sum(nats, axis=1), nats


def generate(
  module: Transformer,
  params: Params,
  state: GenerationState,
  num_tokens: int,
  rng: jax.Array,
  config: SamplingConfig,
  count: jax.Array | None = None,
  allowed: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array, GenerationState]:
  """Continues sequences with tokens of the model's choice.

  The noise of a token depends on the key, its row and its position: generating n tokens and then m
  is the same as generating n + m.

  Args:
    module: the network.
    params: of the module.
    state: of the sequences so far.
    num_tokens: n, how many tokens each row gets.
    rng: key.
    config: how a token is chosen.
    count: [] int32, to stop after fewer than n, which then are followed by zeros; None means n.
    allowed: [W] bool, the tokens to choose from; None means all.

  Returns:
    Tokens [B, n] int32, the log-likelihood [B, n] float32 of each under the model (at temperature
    1, unfiltered), and the state after them.
  """
  scanned = module.config.scan_layers
  decoder = state.decoder
  if scanned:
    module, params = unscanned(module, params)
    decoder = decoder._replace(layers=unstacked(decoder.layers, module.config.num_layers))
  noise = _noise(rng, decoder.position, num_tokens)

  def step(i, carry):
    decoder, token, tokens, scores = carry
    logits, decoder = _apply(module, params, token[:, None], decoder, step=i.astype(jnp.int32))
    # Gathered once, or each sum over the vocabulary would be one over devices.
    logits = with_sharding_constraint(logits[:, 0], ('batch', None))
    token = sampling.choose(noise[i], logits, config, allowed)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, token)
    return decoder, token, tokens.at[i].set(token), scores.at[i].set(-nats)

  shape = num_tokens, state.token.shape[0]
  tokens, scores = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
  carry = for_tokens(module.config, decoder), state.token, tokens, scores
  steps = num_tokens if count is None else count
  # The layers ask for their parameters as the rules say that they lie: the loop needs them, too.
  with _whole_codebooks():
    params = _place_codebooks(module.config, params)
    decoder, token, tokens, scores = jax.lax.fori_loop(0, steps, step, carry)
  decoder = from_tokens(module.config, decoder, jnp.asarray(steps, jnp.int32))
  if scanned:
    decoder = decoder._replace(layers=stacked(decoder.layers))
  return tokens.T, scores.T, GenerationState(decoder, token)


def complete(
  module: Transformer,
  params: Params,
  state: GenerationState,
  prompts: jax.Array,
  rng: jax.Array,
  config: SamplingConfig,
  num_decodes: int = 1,
  allowed: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Continues prompts of different lengths to the same length, each a number of times.

  Args:
    module: the network.
    params: of the module.
    state: of B sequences before their prompts.
    prompts: [B, T] int32, PAD where to generate.
    rng: key.
    config: how a token is chosen.
    num_decodes: D.
    allowed: [W] bool, the tokens to choose from; None means all.

  Returns:
    Tokens [B, D, T] int32, prompts included, and the log-likelihoods [B, D] float32 of what was
    generated, both sorted by these: the likeliest comes last.
  """
  batch_size, length = prompts.shape
  lengths = jnp.sum(jnp.cumprod(prompts != PAD, axis=1), axis=1, dtype=jnp.int32)
  state = repeat(module, read(module, params, state, prompts, lengths)[0], num_decodes)
  count = length - jnp.min(lengths)
  written, scores, _ = generate(module, params, state, length, rng, config, count, allowed)

  def of_prompts(x: jax.Array) -> jax.Array:  # [B * D, T] to [B, D, T]
    return x.reshape(batch_size, num_decodes, length)

  index = jnp.arange(length) - lengths[:, None, None]  # Of the generated tokens, [B, 1, T].
  tokens = jnp.take_along_axis(of_prompts(written), jnp.maximum(index, 0), axis=2)
  tokens = jnp.where(index < 0, prompts[:, None], tokens)
  is_shown = jnp.arange(length) < length - lengths[:, None, None]
  scores = jnp.sum(jnp.where(is_shown, of_prompts(scores), 0), axis=2)
  order = jnp.argsort(scores, axis=1)
  tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
  return tokens, jnp.take_along_axis(scores, order, axis=1)


def for_tokens(config: TransformerConfig, decoder: DecoderState) -> DecoderState:
  """The state in the form that `Transformer` takes with `step`: for one token after the other."""
  return _map_sublayers(lambda mixer, state: mixer.for_tokens(state), config, decoder)


def from_tokens(config: TransformerConfig, decoder: DecoderState, steps: jax.Array) -> DecoderState:
  """The inverse of `for_tokens`, after `steps` tokens of each row."""
  return _map_sublayers(lambda mixer, state: mixer.from_tokens(state, steps), config, decoder)


def _map_sublayers(
  function: Callable[[Mixer, Any], Any], config: TransformerConfig, decoder: DecoderState
) -> DecoderState:
  def of_layer(layer: LayerState) -> LayerState:
    return tuple(
      function(x.mixer, state) for x, state in zip(sublayers.of_layer(config), layer, strict=True)
    )

  if config.scan_layers:
    return decoder._replace(layers=jax.vmap(of_layer)(decoder.layers))
  return decoder._replace(layers=tuple(map(of_layer, decoder.layers)))


def repeat(module: Transformer, state: GenerationState, times: int) -> GenerationState:
  """Each of B sequences `times` times in a row: B * times sequences."""
  axes = GenerationState(batch_axes(module.config), 0)
  return jax.tree.map(lambda x, axis: jnp.repeat(x, times, axis), state, axes)


def unscanned(module: Transformer, params: Params) -> tuple[Transformer, Params]:
  """The same network with layers of their own: the state of a scanned one is copied at each token.

  `generate` does this by itself, at the cost of a copy of the parameters for each call.

  Args:
    module: with `scan_layers`.
    params: of the module, stacked over layers.

  Returns:
    A module without `scan_layers` and its parameters.
  """
  config = dataclasses.replace(module.config, scan_layers=False)
  others = {name: value for name, value in params.items() if name != 'layers'}
  layers = unstacked(params['layers'], config.num_layers)
  return Transformer(config), {**others, **{f'layers_{i}': x for i, x in enumerate(layers)}}


def _apply(
  module: Transformer, params: Params, tokens: jax.Array, state: DecoderState, **kwargs: jax.Array
) -> tuple[jax.Array, DecoderState]:
  logits, state, _ = module.apply({'params': params}, tokens, state, **kwargs)  # pyright: ignore
  return logits, state


def _whole_codebooks() -> contextlib.AbstractContextManager[None]:
  """In it, every device has all codes, where the rules for devices share them out.

  A layer needs all of them: on TPU it would gather them again for each token.
  """
  rules = nn_partitioning.get_axis_rules()
  return nn_partitioning.axis_rules((('code', None), *rules) if rules else ())


def _place_codebooks(config: TransformerConfig, params: Params) -> Params:
  """Puts the parameters of quantizers where the present rules want them."""
  axes = codebook_axes(config)

  def place(path: Any, x: jax.Array) -> jax.Array:
    is_codebook = 'quantizer' in array_name(path).split('/')
    return with_sharding_constraint(x, axes[: x.ndim]) if is_codebook else x

  return jax.tree_util.tree_map_with_path(place, params)


def _noise(rng: jax.Array, position: jax.Array, num_tokens: int) -> jax.Array:
  """[n, B] uniform in [0, 1), by row and position."""

  def draw(row, position):
    key = jax.random.fold_in(jax.random.fold_in(rng, row), position)
    return jax.random.uniform(key, dtype=jnp.float32)

  positions = position + jnp.arange(num_tokens)[:, None]
  return jax.vmap(jax.vmap(draw), in_axes=(None, 0))(jnp.arange(position.shape[0]), positions)
