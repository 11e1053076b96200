"""The decoder-only stack: one forward function for training, evaluation and decoding."""

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning as nn_partitioning
from jax.nn import initializers
from jax.sharding import PartitionSpec

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network import sublayers, xla
from tvq_t5x.network.config import Remat, TransformerConfig
from tvq_t5x.network.layers import (
  DROPOUT,
  SAVE_MARKED,
  SAVE_SMALL,
  SEQUENCE_DROPOUT,
  Embedding,
  Logits,
  RMSNorm,
  dropout,
  residual_stream,
  with_sharding_constraint,
)
from tvq_t5x.network.mixers import Aux, Call, Mixer, State
from tvq_t5x.network.positions import sinusoids

# A state, or an aux, for each sublayer of a layer.
LayerState = tuple[State, ...]
LayerAux = tuple[Aux, ...]

X = TypeVar('X')


class DecoderState(NamedTuple, Generic[X]):
  """What the model remembers of the tokens before a segment, or an X in the place of each array."""

  position: X  # [B] int32, how many tokens those are.
  # A tuple of layers; with scan_layers one LayerState stacked on a leading layers axis, or Apart.
  layers: Any


class Apart(NamedTuple):
  """States of layers that `scan_layers` stacks, each in arrays of its own."""

  layers: tuple[LayerState, ...]


def apart(
  config: TransformerConfig, state: DecoderState | None, axis: int = 0
) -> DecoderState | None:
  """The state in the form in which a loop around the network should carry it.

  The network takes either form, and returns the one that it got. With `unroll_layers` in training,
  the states of layers are arrays of their own: stacked, all of them would be written again after
  each run.

  Args:
    config: of the network.
    state: before or after a segment; None of a model that has none.
    axis: of the layers; leading ones, such as of microbatches, come before it.
  """
  if state is None or isinstance(state.layers, Apart):
    return state
  if not config.scan_layers or _is_loop(config):
    return state
  return state._replace(layers=Apart(unstacked(state.layers, config.num_layers, axis)))


def together(state: DecoderState, axis: int = 0) -> DecoderState:
  """The inverse of `apart`."""
  if not isinstance(state.layers, Apart):
    return state
  return state._replace(layers=stacked(state.layers.layers, axis))


def stacked(layers: Sequence[X], axis: int = 0) -> X:
  """One tree, whose arrays have an axis of layers, of the trees of all layers."""
  return jax.tree.map(lambda *x: jnp.stack(x, axis), *layers)


def unstacked(tree: X, num_layers: int, axis: int = 0) -> tuple[X, ...]:
  """The inverse of `stacked`."""

  def of_layer(i: int) -> X:
    return jax.tree.map(lambda x: jax.lax.index_in_dim(x, i, axis, keepdims=False), tree)

  return tuple(map(of_layer, range(num_layers)))


def init_decoder_state(config: TransformerConfig, batch_size: int) -> DecoderState[jax.Array]:
  """The state before the first token of B sequences."""

  def layer() -> LayerState:
    return tuple(x.mixer.init_state(batch_size) for x in sublayers.of_layer(config))

  if config.scan_layers:
    layers = stacked([layer()] * config.num_layers)
  else:  # Arrays of their own, which can be donated.
    layers = tuple(layer() for _ in range(config.num_layers))
  return DecoderState(jnp.zeros([batch_size], jnp.int32), layers)


def decoder_state_axes(config: TransformerConfig) -> DecoderState[PartitionSpec]:
  """Logical axis names of the arrays of a DecoderState."""
  position = PartitionSpec('batch')
  layer = tuple(x.mixer.state_axes() for x in sublayers.of_layer(config))
  if config.scan_layers:
    return DecoderState(position, jax.tree.map(lambda axes: PartitionSpec('layers', *axes), layer))
  return DecoderState(position, (layer,) * config.num_layers)


def batch_axes(config: TransformerConfig) -> DecoderState[int]:
  """The batch axis of each array of a DecoderState."""
  return jax.tree.map(lambda axes: tuple(axes).index('batch'), decoder_state_axes(config))


class Layer(nn.Module):
  """The sublayers of `TransformerConfig`, each with a residual connection."""

  config: TransformerConfig
  deterministic: bool

  @nn.compact
  def __call__(
    self, x: jax.Array, state: LayerState | None, call: Call
  ) -> tuple[jax.Array, tuple[LayerState, LayerAux]]:
    """[B, T, D] to [B, T, D], with the new states and the losses and metrics of the sublayers."""
    c = self.config
    x = residual_stream(x)
    states, aux = [], []
    for i, (name, make, mixer) in enumerate(sublayers.of_layer(c)):
      run = _run
      if c.remat == Remat.ATTENTION and mixer.SAVES_MARKED:
        run = nn_partitioning.remat(_run, policy=SAVE_MARKED, prevent_cse=not _is_loop(c))
      sublayer = make(config=c, deterministic=self.deterministic, name=name)
      branch, new_state, mixer_aux = run(sublayer, x, state and state[i], call)
      _check_result(mixer, x, branch, new_state, call)
      x = self._add(x, branch, call)
      states.append(new_state)
      aux.append(mixer_aux)
    self.sow('intermediates', 'output', x)
    return x, (tuple(states), tuple(aux))

  def _add(self, x: jax.Array, branch: jax.Array, call: Call) -> jax.Array:
    """The residual connection, with dropout and LayerDrop on the branch."""
    c = self.config
    if not self.deterministic and c.residual_dropout_rate:
      rng = self.make_rng(DROPOUT)
      branch = dropout(rng, branch, c.residual_dropout_rate, call.example_ids, call.position)
    if not self.deterministic and c.layer_drop_rate:
      rng = self.make_rng(SEQUENCE_DROPOUT)
      branch = dropout(rng, branch, c.layer_drop_rate, call.example_ids)
    return residual_stream(x + branch)


def _check_result(mixer: Mixer, x: jax.Array, branch: jax.Array, state: State, call: Call) -> None:
  """Refuses what a mixer returned, if it is not what `Mixer` promises.

  Raises:
    ConfigError: naming the mixer.
  """
  name = type(mixer).__name__
  if branch.shape != x.shape:
    raise ConfigError(
      f'TransformerConfig.sublayers: {name} returns a branch of shape {branch.shape} for an input '
      f'of shape {x.shape}; they are to be the same.'
    )
  if call.step is not None:
    return
  initial = jax.eval_shape(lambda: mixer.init_state(x.shape[0]))
  trees = [jax.tree.structure(tree) for tree in (state, initial, mixer.state_axes())]
  if trees[0] != trees[1] or trees[1] != trees[2]:
    raise ConfigError(
      f'TransformerConfig.sublayers: {name} returns a state of another structure than its '
      'init_state and state_axes give; they are to be the same tree.'
    )


def _is_loop(config: TransformerConfig) -> bool:
  """Whether layers are one program, where common-subexpression elimination undoes no remat."""
  return config.scan_layers and not (config.unroll_layers and xla.in_training())


def _run(mixer: nn.Module, *args: Any) -> Any:
  return mixer(*args)


class Transformer(nn.Module):
  """Transformer-VQ language model.

  Raises:
    ConfigError: if a sublayer of the configuration is none.
  """

  config: TransformerConfig

  def __post_init__(self):
    if self.config is not None and self.config.bidirectional:
      raise ConfigError(
        'TransformerConfig.bidirectional',
        True,
        'False for a language model, whose positions see no later ones; `Classifier` is an encoder',
      )
    sublayers.of_layer(self.config)
    super().__post_init__()

  def example_inputs(self, batch_size: int) -> tuple[jax.Array]:
    """What to initialize the parameters with, which depend on no shape: tokens [B, 1]."""
    return (jnp.zeros([batch_size, 1], jnp.int32),)

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
    num_examples: int | None = None,
    lengths: jax.Array | None = None,
    step: jax.Array | None = None,
    deterministic: bool = True,
  ) -> tuple[jax.Array, DecoderState[jax.Array], LayerAux]:
    """Runs the model over a segment: a whole sequence, part of one, or one token.

    Args:
      tokens: [B, T] int32; L divides T, or T < L.
      state: of the tokens before the segment; None at the start of the sequences.
      loss_mask: [B, T]; positions with 0 enter attention but no loss and no statistic.
      example_ids: [B] int32, place of each example in the global batch; None means 0 to B - 1.
      num_examples: of the global batch; None means B.
      lengths: [B] int32, how many tokens of each row the state after the segment is of; the rest is
        padding. None means all T.
      step: [] int32, tokens since `decoding.for_tokens` made the state, which takes one token of
        each row; None for any other state.
      deterministic: False applies dropout, with rngs 'dropout' (new for each update) and
        'sequence_dropout' (the same for all updates of a sequence).

    Returns:
      Logits [B, T, W] float32, the state after the segment, and for each sublayer of a layer its
      losses and metrics, every leaf [layers].
    """
    c = self.config
    batch_size, length = tokens.shape
    position = jnp.zeros([batch_size], jnp.int32) if state is None else state.position
    call = Call(
      position=position,
      loss_mask=jnp.ones(tokens.shape, jnp.float32)
      if loss_mask is None
      else loss_mask.astype(jnp.float32),
      example_ids=jnp.arange(batch_size) if example_ids is None else example_ids,
      lengths=lengths,
      step=step,
      num_examples=None if num_examples is None else jnp.int32(num_examples),
    )
    embedding = Embedding(c, name='token_embedder')
    x = embed_positions(c, embedding(tokens), position)
    layers = None if state is None else state.layers
    x, layers, aux = run_layers(c, x, layers, call, deterministic)
    if c.final_norm:
      x = RMSNorm(name='final_norm')(x)
    logits = Logits(c, name='logits')(x, embedding if c.tied_embeddings else None)
    logits = with_sharding_constraint(logits, ('batch', 'length', 'vocab'))
    position = position + (length if lengths is None else lengths)
    return logits, DecoderState(position, layers), aux


def embed_positions(config: TransformerConfig, x: jax.Array, position: jax.Array) -> jax.Array:
  """Adds scaled sinusoids to embeddings where `absolute_positions` says so; within a module.

  Args:
    config: of the network.
    x: [B, T, D], embeddings.
    position: [B] int32, of the first of them.

  Returns:
    [B, T, D], laid out as the layers take it.
  """
  if config.absolute_positions:
    scale = nn_partitioning.param_with_axes(
      'position_scale', initializers.zeros, (), jnp.float32, axes=()
    )
    positions = position[:, None] + jnp.arange(x.shape[1])
    added = scale * sinusoids(positions, config.emb_dim, config.max_wavelength)
    x = x + added.astype(config.dtype)
  return residual_stream(x)


def run_layers(
  config: TransformerConfig, x: jax.Array, states: Any, call: Call, deterministic: bool
) -> tuple[jax.Array, Any, LayerAux]:
  """Runs the layers of a network, as parts of the module that calls this.

  Args:
    config: of the network.
    x: [B, T, D], the residual stream.
    states: of the layers, as `DecoderState.layers`; None at the start of the sequences.
    call: what the sublayers are told.
    deterministic: whether there is no dropout.

  Returns:
    [B, T, D], the states after the segment, and for each sublayer of a layer its losses and
    metrics, every leaf [layers].
  """
  c = config
  layer_cls = Layer
  if c.remat == Remat.LAYER:
    layer_cls = nn_partitioning.remat(Layer, policy=SAVE_SMALL, prevent_cse=not _is_loop(c))
  if c.scan_layers:
    layers = nn_partitioning.scan_with_axes(
      layer_cls,
      variable_axes={'params': 0, 'intermediates': 0},
      split_rngs={'params': True, DROPOUT: True, SEQUENCE_DROPOUT: True},
      in_axes=(0, nn.broadcast),
      out_axes=0,
      length=c.num_layers,
      axis_name='layers',
      unroll=1 if _is_loop(c) else c.num_layers,
    )
    is_apart = isinstance(states, Apart)
    if is_apart:
      states = stacked(states.layers)
    x, (states, aux) = layers(c, deterministic, name='layers')(x, states, call)
    return x, Apart(unstacked(states, c.num_layers)) if is_apart else states, aux
  new_states, aux = [], []
  for i in range(c.num_layers):
    layer = layer_cls(c, deterministic, name=f'layers_{i}')
    x, (new_state, layer_aux) = layer(x, states and states[i], call)
    new_states.append(new_state)
    aux.append(layer_aux)
  return x, tuple(new_states), stacked(aux)
