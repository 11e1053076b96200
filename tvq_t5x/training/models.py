"""The model object that T5X and the standalone runner drive: losses, scores and samples of batches.

It has the interface of `t5x.models.BaseModel` by duck typing and imports no T5X. SeqIO is imported
with the first model: reading this module loads no TensorFlow.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import serialization, traverse_util
from flax.linen import partitioning as nn_partitioning

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network import decoding
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import DROPOUT, SEQUENCE_DROPOUT
from tvq_t5x.network.mixers import Loss, Statistics
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.network.transformer import (
  DecoderState,
  LayerAux,
  Transformer,
  decoder_state_axes,
  init_decoder_state,
)
from tvq_t5x.training import metrics as metrics_lib
from tvq_t5x.training import optimizers

if TYPE_CHECKING:
  import seqio

Batch = Mapping[str, jax.Array]
Params = Any


class DropoutRngs(NamedTuple):
  """Keys of the two dropouts; masks depend on them and on the examples' ids only."""

  update: jax.Array  # New for each parameter update.
  sequence: jax.Array  # The same for all updates of a sequence.

  def collections(self) -> dict[str, jax.Array]:
    """As flax's `rngs`."""
    return {DROPOUT: self.update, SEQUENCE_DROPOUT: self.sequence}


class TransformerVQModel:
  """Decoder-only language model over batches of a `TransformerVQFeatureConverter`.

  Batches have `decoder_input_tokens` and `decoder_target_tokens` [B, T] int32, and
  `decoder_loss_weights` [B, T], 0 on padding.
  """

  def __init__(
    self,
    module: Transformer,
    vocabulary: 'seqio.Vocabulary',
    optimizer: optax.GradientTransformation,
    carry_state: bool = False,
    optimizer_wrapper: Callable[[optax.GradientTransformation], Any] | None = None,
  ):
    """Creates the model.

    Args:
      module: the network.
      vocabulary: of inputs and outputs; at most W ids.
      optimizer: of all parameters but the codebooks.
      carry_state: whether training carries window and cache on from each batch to the next, row by
        row; `streaming.training_batches` has such batches.
      optimizer_wrapper: makes T5X's `optimizer_def` of the optimizer and the codebooks' averages;
        `t5x_adapter.optimizer.OptaxWrapper`. None means that T5X does not train the model.

    Raises:
      ConfigError: if the vocabulary has more ids than the network.
    """
    from tvq_t5x.data import vocabularies

    if vocabulary.vocab_size > module.config.vocab_size:
      raise ConfigError(
        f'TransformerConfig.vocab_size = {module.config.vocab_size} is not accepted: '
        f'TransformerVQModel.vocabulary needs at least {vocabulary.vocab_size}.'
      )
    self.module = module
    self.carry_state = carry_state
    self.input_vocabulary = self.output_vocabulary = vocabulary
    self.optimizer = optimizers.with_codebook_ema(optimizer, module.config.ema_decay)
    self.bytes_per_token = vocabularies.bytes_per_token(vocabulary, module.config.vocab_size)
    self.sampled_ids = vocabularies.sampled_ids(vocabulary, module.config.vocab_size)
    self.optimizer_wrapper = optimizer_wrapper

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(**kwargs)
    # gin can give the settings of this method a class at a time, and refuses a class that shares
    # it with another one: so each has its own.
    if 'predict_batch_with_aux' not in vars(cls):

      @functools.wraps(cls.predict_batch_with_aux)
      def predict_batch_with_aux(self: 'TransformerVQModel', *args: Any, **kwargs: Any) -> Any:
        return super(cls, self).predict_batch_with_aux(*args, **kwargs)  # pyright: ignore

      predict_batch_with_aux.__module__ = cls.__module__
      predict_batch_with_aux.__qualname__ = f'{cls.__qualname__}.predict_batch_with_aux'
      cls.predict_batch_with_aux = predict_batch_with_aux

  @property
  def config(self) -> TransformerConfig:
    """The network's hyperparameters."""
    return self.module.config

  @property
  def optimizer_def(self) -> Any:
    """The optimizer as T5X takes it.

    Raises:
      ConfigError: without an `optimizer_wrapper`.
    """
    if self.optimizer_wrapper is None:
      raise ConfigError(
        'TransformerVQModel.optimizer_wrapper = None: T5X trains with one; give '
        '@optimizer.OptaxWrapper of tvq_t5x.t5x_adapter, as gin/runs/pretrain.gin does.'
      )
    return self.optimizer_wrapper(self.optimizer)

  @property
  def FEATURE_CONVERTER_CLS(self) -> 'type[seqio.FeatureConverter]':
    """Makes the batches from the features of a task."""
    from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter

    return TransformerVQFeatureConverter

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """Initial `params` and their `params_axes`; parameters depend on no input shape.

    Where the state is carried on, also that of as many sequences as `decoder_input_tokens` has, as
    `carried` and `carried_axes`.
    """
    del input_types
    batch_size = input_shapes['decoder_input_tokens'][0]
    tokens = jnp.zeros([batch_size, 1], jnp.int32)
    variables = dict(self.module.init(rng, tokens))
    if self.carry_state:
      variables |= self._carried_variables(batch_size)
    return variables

  def _carried_variables(self, batch_size: int) -> dict[str, Any]:
    state = traverse_util.flatten_dict(serialization.to_state_dict(self.init_state(batch_size)))
    names = serialization.to_state_dict(decoder_state_axes(self.config))
    axes = {
      (*path[:-1], f'{path[-1]}_axes'): nn_partitioning.AxisMetadata(names=tuple(x))
      for path, x in traverse_util.flatten_dict(names).items()
    }
    variables = {'carried': state, 'carried_axes': axes}
    return {name: traverse_util.unflatten_dict(x) for name, x in variables.items()}

  def init_state(self, batch_size: int) -> DecoderState:
    """The state before the first token of B sequences."""
    return init_decoder_state(self.config, batch_size)

  def segment_loss(
    self,
    params: Params,
    batch: Batch,
    state: DecoderState | None,
    rngs: DropoutRngs | None,
    normalizing_factor: float,
    example_ids: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple[DecoderState, metrics_lib.Metrics]]:
    """Loss of a segment that continues the sequences of `state`.

    Args:
      params: of the module.
      batch: the segment, [B, T] each.
      state: of the tokens before it; None at the start of the sequences.
      rngs: of dropout; None means no dropout.
      normalizing_factor: what the summed losses are divided by. Gradients of parts of a batch that
        share it add up to those of the whole.
      example_ids: [B] int32, place of each example in the global batch.

    Returns:
      `(cross entropy + losses of the sublayers) / factor`, for VQ beta times the commitment, plus a
      zero whose gradient carries the codebook statistics; the state after the segment and the
      metrics.
    """
    targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights']
    weights = weights.astype(jnp.float32)
    logits, state, aux = self._apply(
      params,
      batch['decoder_input_tokens'],
      state,
      loss_mask=weights,
      example_ids=example_ids,
      deterministic=rngs is None,
      rngs=rngs.collections() if rngs else None,
    )
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    metrics = metrics_lib.token_metrics(logits, nats, targets, weights, self.bytes_per_token)
    metrics |= metrics_lib.sublayer_metrics(aux, jnp.sum(weights))
    total, statistics = jnp.sum(weights * self.token_losses(logits, targets, nats)), 0.0
    for said in itertools.chain.from_iterable(x.values() for x in aux):
      if isinstance(said, Loss):
        total = total + jnp.sum(said.weight * said.total)
      elif isinstance(said, Statistics):
        statistics = statistics + jnp.sum(said.zero)
    return total / normalizing_factor + statistics, (state, metrics)

  def token_losses(self, logits: jax.Array, targets: jax.Array, nats: jax.Array) -> jax.Array:
    """What is minimized at each token; subclasses have other losses.

    Args:
      logits: [B, T, W] float32.
      targets: [B, T] int32.
      nats: [B, T] float32, the cross entropy, which metrics and evaluation have in any case.

    Returns:
      [B, T] float32; by default `nats`.
    """
    del logits, targets
    return nats

  def _apply(
    self, params: Params, tokens: jax.Array, state: DecoderState | None, **kwargs: Any
  ) -> tuple[jax.Array, DecoderState, LayerAux]:
    return self.module.apply({'params': params}, tokens, state, **kwargs)  # pyright: ignore

  def loss_fn(
    self, params: Params, batch: Batch, dropout_rng: jax.Array | None
  ) -> tuple[jax.Array, metrics_lib.Metrics]:
    """Loss and metrics of whole sequences, as one update."""
    rngs = None if dropout_rng is None else DropoutRngs(*jax.random.split(dropout_rng))
    size = batch['decoder_target_tokens'].size
    loss, (_, metrics) = self.segment_loss(params, batch, None, rngs, size)
    return loss, metrics

  def eval_fn(self, params: Params, batch: Batch) -> tuple[jax.Array, metrics_lib.Metrics]:
    """Loss and metrics of whole sequences, without dropout."""
    return self.loss_fn(params, batch, dropout_rng=None)

  def score_batch(
    self, params: Params, batch: Batch, return_intermediates: bool = False
  ) -> tuple[jax.Array, Mapping[str, Any]]:
    """Log-likelihoods of sequences, in nats.

    Args:
      params: of the module.
      batch: sequences, [B, T] each.
      return_intermediates: whether to return what the network keeps for inspection.

    Returns:
      Log-likelihood [B] of each sequence's unpadded targets, and what to divide it by:
      `num_tokens` [B] and, for vocabularies that tell, the `num_bytes` [B] of text that they stand
      for. Besides, the collection `intermediates`, where it was asked for.
    """
    targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights']
    (logits, _, _), intermediates = self.module.apply(
      {'params': params},
      batch['decoder_input_tokens'],
      loss_mask=weights,
      mutable=['intermediates'] if return_intermediates else [],
    )
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    aux: dict[str, Any] = {'num_tokens': jnp.sum(weights, axis=-1), **intermediates}
    if self.bytes_per_token is not None:
      aux['num_bytes'] = jnp.sum(weights * jnp.asarray(self.bytes_per_token)[targets], axis=-1)
    return -jnp.sum(nats * weights, axis=-1), aux

  def predict_batch(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Tokens [B, T] of `predict_batch_with_aux`."""
    return self.predict_batch_with_aux(params, batch, rng=rng)[0]

  def predict_batch_with_aux(
    self,
    params: Params,
    batch: Batch,
    rng: jax.Array | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    num_decodes: int = 1,
    return_all_decodes: bool = False,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Continues each row's target tokens, up to their first padding, to T tokens.

    Ids that stand for nothing are never chosen, see `vocabularies.sampled_ids`.

    Args:
      params: of the module.
      batch: prompts as `decoder_target_tokens` [B, T], 0 where to generate.
      rng: key of the samples; None means greedy choice.
      temperature: of the softmax; 0 means greedy choice.
      top_p: share of the probability mass to sample from.
      top_k: how many of the likeliest tokens to sample from; 0 means all.
      num_decodes: D, how many continuations of each row to sample.
      return_all_decodes: whether to return all of them instead of the likeliest.

    Returns:
      Tokens [B, T], prompts included, and `{'scores': [B]}`, the generated tokens' log-likelihood
      under the model. With all decodes, [B, D, T] and [B, D], the likeliest last.

    Raises:
      ConfigError: for no decodes.
    """
    if num_decodes < 1:
      raise ConfigError(f'predict_batch_with_aux.num_decodes = {num_decodes}: give at least 1.')
    prompts = batch['decoder_target_tokens'].astype(jnp.int32)
    state = decoding.start(self.module, prompts.shape[0])
    state = state._replace(token=batch['decoder_input_tokens'][:, 0].astype(jnp.int32))
    settings = SamplingConfig(
      temperature=0 if rng is None else temperature, top_p=top_p, top_k=top_k
    )
    rng = jax.random.key(0) if rng is None else rng
    tokens, scores = decoding.complete(
      self.module, params, state, prompts, rng, settings, num_decodes, self.sampled_ids
    )
    if return_all_decodes:
      return tokens, {'scores': scores}
    return tokens[:, -1], {'scores': scores[:, -1]}
