"""The language model that T5X and the standalone runner drive: losses, scores, samples of batches.

It imports no T5X. SeqIO is imported with the first model: reading this module loads no TensorFlow.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import serialization, traverse_util
from flax.linen import partitioning as nn_partitioning

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.common.tokens import PAD
from tvq_t5x.network import decoding
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.network.transformer import (
  DecoderState,
  LayerAux,
  Transformer,
  decoder_state_axes,
  init_decoder_state,
)
from tvq_t5x.training import metrics as metrics_lib
from tvq_t5x.training.base_model import Batch, DropoutRngs, Model, Params, sublayer_losses

if TYPE_CHECKING:
  import seqio


class TransformerVQModel(Model):
  """Decoder-only language model over batches of a `TransformerVQFeatureConverter`.

  Batches have `decoder_input_tokens` and `decoder_target_tokens` [B, T] int32, and
  `decoder_loss_weights` [B, T], 0 on padding and on other targets that are not to be learned. Keys
  of these, unlike those of padding, have a commitment loss and belong to the codebooks' statistics.
  """

  LENGTH_FEATURE: ClassVar[str] = 'targets'
  UNIT: ClassVar[str] = 'token'

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
      optimizer_wrapper: as `Model`'s.

    Raises:
      ConfigError: if the vocabulary has more ids than the network.
    """
    from tvq_t5x.data import vocabularies

    if vocabulary.vocab_size > module.config.vocab_size:
      raise ConfigError(
        f'TransformerConfig.vocab_size = {module.config.vocab_size} is not accepted: '
        f'TransformerVQModel.vocabulary needs at least {vocabulary.vocab_size}.'
      )
    super().__init__(module, optimizer, optimizer_wrapper)
    self.carry_state = carry_state
    self.input_vocabulary = self.output_vocabulary = vocabulary
    self.bytes_per_token = vocabularies.bytes_per_token(vocabulary, module.config.vocab_size)
    self.sampled_ids = vocabularies.sampled_ids(vocabulary, module.config.vocab_size)

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
  def FEATURE_CONVERTER_CLS(self) -> 'type[seqio.FeatureConverter]':
    """Makes the batches from the features of a task."""
    from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter

    return TransformerVQFeatureConverter

  @property
  def data_identity(self) -> str:
    """The identity of the vocabulary."""
    from tvq_t5x.data import vocabularies

    return vocabularies.identity(self.output_vocabulary)

  def check_task(self, mixture_or_task_name: Any, module: str | None) -> None:
    """Refuses a task with another vocabulary."""
    from tvq_t5x.data import datasets

    vocabulary = datasets.vocabulary(mixture_or_task_name, module)
    if vocabulary != self.output_vocabulary:
      raise ConfigError(
        f'TransformerVQModel.vocabulary = {self.output_vocabulary} is not the one of '
        f'DatasetConfig.mixture_or_task_name = {mixture_or_task_name!r}: give {vocabulary}.'
      )

  def batch_spec(self, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch holds."""
    dtypes = {
      'decoder_input_tokens': jnp.int32,
      'decoder_target_tokens': jnp.int32,
      'decoder_loss_weights': jnp.float32,
    }
    return {n: jax.ShapeDtypeStruct((batch_size, length), dtype) for n, dtype in dtypes.items()}

  def batch_shape(self, batch: Batch) -> tuple[int, int]:
    """B and T of a batch."""
    num_sequences, length = batch['decoder_target_tokens'].shape
    return num_sequences, length

  def normalizing_factor(self, num_sequences: int, length: int) -> int:
    """All tokens: the loss is a mean over them."""
    return num_sequences * length

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
    variables = dict(super().get_initial_variables(rng, input_shapes, input_types))
    if self.carry_state:
      variables |= self._carried_variables(input_shapes['decoder_input_tokens'][0])
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
    num_examples: int | None = None,
  ) -> tuple[jax.Array, tuple[DecoderState, metrics_lib.Metrics]]:
    """See `Model`; arrays of the segment are [B, T]."""
    targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights']
    weights = weights.astype(jnp.float32)
    mask = (targets != PAD).astype(jnp.float32)
    logits, state, aux = self._apply(
      params,
      batch['decoder_input_tokens'],
      state,
      loss_mask=mask,
      example_ids=example_ids,
      num_examples=num_examples,
      deterministic=rngs is None,
      rngs=rngs.collections() if rngs else None,
    )
    with jax.named_scope('loss'):
      nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
      metrics = metrics_lib.token_metrics(logits, nats, targets, weights, self.bytes_per_token)
      total = jnp.sum(weights * self.token_losses(logits, targets, nats))
    metrics |= metrics_lib.sublayer_metrics(aux, jnp.sum(mask))
    losses, statistics = sublayer_losses(aux)
    total = total + losses
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
      loss_mask=targets != PAD,
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

  def evaluation_report(
    self, values: Mapping[str, float], count: Callable[[str], int]
  ) -> dict[str, Any]:
    """The metrics, `perplexity` (of tokens), `tokens` and, where it is known, `bytes` of text.

    Of images there are `dimensions` and `bits_per_dimension`, in place of bytes.
    """
    from tvq_t5x.data import likelihood, vocabularies

    bits, size, found = 'bits_per_byte', 'bytes', dict(values)
    if isinstance(self.output_vocabulary, vocabularies.ImageVocabulary):
      bits, size = 'bits_per_dimension', 'dimensions'  # As the literature has it.
      found[bits] = found.pop('bits_per_byte')
    return {
      'tokens': count('cross_entropy'),
      **({size: count('bits_per_byte')} if bits in found else {}),
      **found,
      'perplexity': likelihood.perplexity(values['cross_entropy']),
    }


def language_model_of(model: Model) -> TransformerVQModel:
  """The model of a checkpoint, if it can read and write.

  Raises:
    ConfigError: if it is a classifier.
  """
  if not isinstance(model, TransformerVQModel):
    raise ConfigError(
      f'--checkpoint is of a {type(model).__name__}, an encoder, which neither writes nor scores '
      'texts, and has no form that convert exports: give one of a language model, or try '
      'python -m tvq_t5x.evaluate.'
    )
  return model
