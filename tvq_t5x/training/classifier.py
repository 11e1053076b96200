"""The model object of a classifier, which T5X and the standalone runner drive."""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network.classifier import Classifier
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.transformer import DecoderState, LayerAux
from tvq_t5x.training import metrics as metrics_lib
from tvq_t5x.training.base_model import Batch, DropoutRngs, Model, Params, sublayer_losses

if TYPE_CHECKING:
  import seqio

  from tvq_t5x.data.classification import Format


class ClassifierModel(Model):
  """An encoder over batches of a `ClassificationFeatureConverter`.

  Batches have `encoder_input_tokens` [B, T], int32 or float32, `encoder_lengths` [B] int32, `label`
  [B] int32 and `label_weights` [B], 0 for rows that are none; of two texts, the second as
  `encoder_input_tokens_2` and `encoder_lengths_2`.
  """

  LENGTH_FEATURE: ClassVar[str] = 'inputs'
  UNIT: ClassVar[str] = 'example'

  def __init__(
    self,
    config: TransformerConfig,
    task_format: 'Format',
    optimizer: optax.GradientTransformation,
    carry_state: bool = False,
    optimizer_wrapper: Callable[[optax.GradientTransformation], Any] | None = None,
  ):
    """Creates the model.

    Args:
      config: of the encoder, with `bidirectional`.
      task_format: what is to be classified, see `classification.task_format`.
      optimizer: of all parameters but the codebooks.
      carry_state: False, as there is no state to carry on to the next batch.
      optimizer_wrapper: as `Model`'s.

    Raises:
      ConfigError: if the vocabulary has more ids than the network, or for a setting that an encoder
        can't have.
    """
    if carry_state:
      raise ConfigError(
        'ClassifierModel.carry_state', carry_state, 'False: an encoder has no state'
      )
    vocabulary, num_classes, pair = task_format
    if vocabulary is not None and vocabulary.vocab_size > config.vocab_size:
      raise ConfigError(
        f'TransformerConfig.vocab_size = {config.vocab_size} is not accepted: '
        f'ClassifierModel.task_format needs at least {vocabulary.vocab_size}.'
      )
    module = Classifier(config, num_classes, real_inputs=vocabulary is None, pair=pair)
    super().__init__(module, optimizer, optimizer_wrapper)
    self.task_format = task_format

  @property
  def FEATURE_CONVERTER_CLS(self) -> 'Callable[..., seqio.FeatureConverter]':
    """Makes the batches from the features of a task."""
    from tvq_t5x.data.feature_converters import ClassificationFeatureConverter

    return functools.partial(
      ClassificationFeatureConverter, real_inputs=self.module.real_inputs, pair=self.module.pair
    )

  @property
  def data_identity(self) -> str:
    """The format of the task."""
    return self.task_format.identity

  def check_task(self, mixture_or_task_name: Any, module: str | None) -> None:
    """Refuses a task with other inputs or classes."""
    from tvq_t5x.data import classification

    found = classification.task_format(mixture_or_task_name, module)
    if found != self.task_format:
      raise ConfigError(
        f'ClassifierModel.task_format is {self.data_identity}, and '
        f'DatasetConfig.mixture_or_task_name = {mixture_or_task_name!r} has {found.identity}: give '
        'the format of that task.'
      )

  def batch_spec(self, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch holds."""
    dtype = jnp.float32 if self.module.real_inputs else jnp.int32
    found = {
      'label': jax.ShapeDtypeStruct((batch_size,), jnp.int32),
      'label_weights': jax.ShapeDtypeStruct((batch_size,), jnp.float32),
    }
    for suffix in ('', '_2') if self.module.pair else ('',):
      shape = batch_size, length
      found[f'encoder_input_tokens{suffix}'] = jax.ShapeDtypeStruct(shape, dtype)
      found[f'encoder_lengths{suffix}'] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return found

  def batch_shape(self, batch: Batch) -> tuple[int, int]:
    """B and T of a batch."""
    num_sequences, length = batch['encoder_input_tokens'].shape
    return num_sequences, length

  def normalizing_factor(self, num_sequences: int, length: int) -> int:
    """B: the loss is a mean over examples."""
    del length
    return num_sequences

  def segment_loss(
    self,
    params: Params,
    batch: Batch,
    state: DecoderState | None,
    rngs: DropoutRngs | None,
    normalizing_factor: float,
    example_ids: jax.Array | None = None,
    num_examples: int | None = None,
  ) -> tuple[jax.Array, tuple[None, metrics_lib.Metrics]]:
    """The loss of whole sequences; see `Model`.

    The sublayers' losses, which are sums over positions, are divided by T as well.
    """
    del state
    weights = batch['label_weights'].astype(jnp.float32)
    logits, aux = self._apply(
      params,
      batch,
      example_ids=example_ids,
      num_examples=num_examples,
      deterministic=rngs is None,
      rngs=rngs.collections() if rngs else None,
    )
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    total, count = jnp.sum(weights * nats), jnp.sum(weights)
    hits = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == batch['label']))
    metrics = {
      'cross_entropy': metrics_lib.average(total, count),
      'accuracy': metrics_lib.average(hits, count),
    }
    num_tokens = sum(jnp.sum(batch[name]) for name in batch if name.startswith('encoder_lengths'))
    metrics |= metrics_lib.sublayer_metrics(aux, jnp.asarray(num_tokens))
    losses, statistics = sublayer_losses(aux)
    num_texts = 2 if self.module.pair else 1
    total = total + losses / (num_texts * self.batch_shape(batch)[1])
    return total / normalizing_factor + statistics, (None, metrics)

  def _apply(self, params: Params, batch: Batch, **kwargs: Any) -> tuple[jax.Array, LayerAux]:
    """Logits [B, classes] float32, and what the sublayers say."""
    names = ['encoder_input_tokens', 'encoder_lengths']
    names += [f'{name}_2' for name in names] if self.module.pair else []
    inputs = [batch[name] for name in names]
    return self.module.apply({'params': params}, *inputs, **kwargs)

  def _log_probabilities(self, params: Params, batch: Batch) -> jax.Array:
    return jax.nn.log_softmax(self._apply(params, batch)[0])

  def score_batch(
    self, params: Params, batch: Batch, return_intermediates: bool = False
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Log-likelihoods of the labels, in nats.

    Args:
      params: of the module.
      batch: examples.
      return_intermediates: has no effect: T5X asks for them where a task's metrics do.

    Returns:
      Log-likelihood [B] of each label, and `log_probabilities` [B, classes] of all classes.
    """
    del return_intermediates
    found = self._log_probabilities(params, batch)
    scores = jnp.take_along_axis(found, batch['label'][:, None], axis=-1)[:, 0]
    return scores, {'log_probabilities': found}

  def predict_batch(self, params: Params, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Classes [B, 1] of `predict_batch_with_aux`."""
    return self.predict_batch_with_aux(params, batch, rng)[0]

  def predict_batch_with_aux(
    self, params: Params, batch: Batch, rng: jax.Array | None = None
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The likeliest class of each example.

    Args:
      params: of the module.
      batch: examples; their labels are not looked at.
      rng: has no effect, as nothing is drawn.

    Returns:
      Classes [B, 1] int32, a sequence of one as the feature `label` is, and by name: `scores` [B],
      the log-likelihood of each, and `log_probabilities` [B, classes].
    """
    del rng
    found = self._log_probabilities(params, batch)
    classes = jnp.argmax(found, axis=-1).astype(jnp.int32)[:, None]
    scores = {'scores': jnp.max(found, axis=-1), 'log_probabilities': found}
    return classes, scores

  def evaluation_report(
    self, values: Mapping[str, float], count: Callable[[str], int]
  ) -> dict[str, Any]:
    """The metrics, and `examples`."""
    return {'examples': count('cross_entropy'), **values}
