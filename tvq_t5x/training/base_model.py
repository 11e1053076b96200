"""What both engines ask of a model object, and what all of ours have in common."""

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network.config import TransformerConfig
from tvq_t5x.network.layers import DROPOUT, SEQUENCE_DROPOUT
from tvq_t5x.network.mixers import Loss, Statistics
from tvq_t5x.network.transformer import DecoderState, LayerAux
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


class Model:
  """A model object with the interface of `t5x.models.BaseModel`, by duck typing.

  Attributes:
    module: the network; its `example_inputs` are what its parameters are initialized with.
    optimizer: of all parameters, the codebooks' averages included.
    carry_state: whether training carries a state on from each batch to the next.
  """

  # The task feature whose length is T.
  LENGTH_FEATURE: ClassVar[str]
  # What the cross entropy is of.
  UNIT: ClassVar[str]

  module: Any
  carry_state: bool = False

  def __init__(
    self,
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    optimizer_wrapper: Callable[[optax.GradientTransformation], Any] | None = None,
  ):
    """Creates the model.

    Args:
      module: the network.
      optimizer: of all parameters but the codebooks.
      optimizer_wrapper: makes T5X's `optimizer_def` of the optimizer and the codebooks' averages;
        `t5x_adapter.optimizer.OptaxWrapper`. None means that T5X does not train the model.
    """
    self.module = module
    self.optimizer = optimizers.with_codebook_ema(optimizer, self.config.ema_decay)
    self.optimizer_wrapper = optimizer_wrapper

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
      name = type(self).__name__
      raise ConfigError(
        f'{name}.optimizer_wrapper = None: T5X trains with one; give @optimizer.OptaxWrapper of '
        'tvq_t5x.t5x_adapter, as gin/runs/pretrain.gin does.'
      )
    return self.optimizer_wrapper(self.optimizer)

  @property
  def FEATURE_CONVERTER_CLS(self) -> 'Callable[..., seqio.FeatureConverter]':
    """Makes the batches from the features of a task."""
    raise NotImplementedError

  @property
  def data_identity(self) -> str:
    """What tasks have in common whose batches mean the same to the model, see `datasets`."""
    raise NotImplementedError

  def check_task(self, mixture_or_task_name: Any, module: str | None) -> None:
    """Refuses a task whose batches mean something else.

    Args:
      mixture_or_task_name: as in `DatasetConfig`.
      module: likewise.

    Raises:
      ConfigError: naming the setting.
    """
    raise NotImplementedError

  def batch_spec(self, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What a batch of B sequences of T holds."""
    raise NotImplementedError

  def batch_shape(self, batch: Batch) -> tuple[int, int]:
    """B and T of a batch."""
    raise NotImplementedError

  def normalizing_factor(self, num_sequences: int, length: int) -> int:
    """What the losses of a segment are a mean over: `length` tokens of each sequence, or these."""
    raise NotImplementedError

  def init_params(self, rng: jax.Array) -> Params:
    """Initial parameters."""
    return self.module.init(rng, *self.module.example_inputs(1))['params']

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """Initial `params` and their `params_axes`; they depend on no input shape."""
    del input_shapes, input_types
    return dict(self.module.init(rng, *self.module.example_inputs(1)))

  def init_state(self, batch_size: int) -> DecoderState | None:
    """The state before the first token of B sequences; None of a model that has none."""
    del batch_size

  def segment_loss(
    self,
    params: Params,
    batch: Batch,
    state: DecoderState | None,
    rngs: DropoutRngs | None,
    normalizing_factor: float,
    example_ids: jax.Array | None = None,
    num_examples: int | None = None,
  ) -> tuple[jax.Array, tuple[DecoderState | None, metrics_lib.Metrics]]:
    """Loss of a segment that continues the sequences of `state`.

    Args:
      params: of the module.
      batch: the segment.
      state: of the tokens before it; None at the start of the sequences.
      rngs: of dropout; None means no dropout.
      normalizing_factor: what the summed losses are divided by. Gradients of parts of a batch that
        share it add up to those of the whole.
      example_ids: [B] int32, place of each example in the global batch.
      num_examples: of the global batch; None means B.

    Returns:
      `(cross entropy + losses of the sublayers) / factor`, for VQ beta times the commitment, plus a
      zero whose gradient carries the codebook statistics; the state after the segment and the
      metrics.
    """
    raise NotImplementedError

  def loss_fn(
    self, params: Params, batch: Batch, dropout_rng: jax.Array | None
  ) -> tuple[jax.Array, metrics_lib.Metrics]:
    """Loss and metrics of whole sequences, as one update."""
    rngs = None if dropout_rng is None else DropoutRngs(*jax.random.split(dropout_rng))
    factor = self.normalizing_factor(*self.batch_shape(batch))
    loss, (_, metrics) = self.segment_loss(params, batch, None, rngs, factor)
    return loss, metrics

  def eval_fn(self, params: Params, batch: Batch) -> tuple[jax.Array, metrics_lib.Metrics]:
    """Loss and metrics of whole sequences, without dropout."""
    return self.loss_fn(params, batch, dropout_rng=None)

  def evaluation_report(
    self, values: Mapping[str, float], count: Callable[[str], int]
  ) -> dict[str, Any]:
    """What to say of the evaluation of a split.

    Args:
      values: metrics by name.
      count: of a metric, what its total was divided by.
    """
    raise NotImplementedError


def sublayer_losses(aux: LayerAux) -> tuple[jax.Array | float, jax.Array | float]:
  """Of all sublayers, the weighted losses, summed over positions, and the statistics' zero."""
  total, statistics = 0.0, 0.0
  for said in itertools.chain.from_iterable(x.values() for x in aux):
    if isinstance(said, Loss):
      total = total + jnp.sum(said.weight * said.total)
    elif isinstance(said, Statistics):
      statistics = statistics + jnp.sum(said.zero)
  return total, statistics
