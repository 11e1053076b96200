"""Texts or images that a model makes during training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import seqio

from tvq_t5x.common.errors import ConfigError, is_count
from tvq_t5x.common.tokens import EOS
from tvq_t5x.data.text_streams import encode
from tvq_t5x.data.vocabularies import ImageVocabulary
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.training.models import Params, TransformerVQModel
from tvq_t5x.training.partitioning import DATA, Partitioner


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  """Which texts to write.

  Attributes:
    num_samples: texts at a time.
    length: tokens of each, those of the prompt included.
    temperature: of the softmax; 0 chooses the likeliest token.
    top_p: share of the probability mass to sample from.
    prompt: how each text begins.
  """

  num_samples: int = 2
  length: int = 256
  temperature: float = 1.0
  top_p: float = 0.95
  prompt: str = ''

  def __post_init__(self):
    for name in ('num_samples', 'length'):
      value = getattr(self, name)
      if not is_count(value):
        raise ConfigError(f'SampleConfig.{name}', value, 'a whole number of at least 1')
    SamplingConfig(self.temperature, self.top_p)

  def encoded_prompt(self, vocabulary: seqio.Vocabulary) -> list[int]:
    """The prompt's tokens.

    Raises:
      ConfigError: if they leave no room, or the vocabulary lacks some.
    """
    prompt = encode(self.prompt, vocabulary, 'SampleConfig.prompt') if self.prompt else []
    if len(prompt) >= self.length:
      raise ConfigError(
        'SampleConfig.prompt',
        self.prompt,
        'fewer, or a greater length',
        problem=f'has {len(prompt)} tokens and SampleConfig.length = {self.length}',
      )
    return prompt


class Sampler:
  """Makes texts or images from parameters, compiled once."""

  def __init__(
    self,
    model: TransformerVQModel,
    partitioner: Partitioner,
    params_shardings: Any,
    config: SampleConfig,
    rng: jax.Array,
  ):
    """Compiles nothing yet.

    Args:
      model: writes.
      partitioner: places texts.
      params_shardings: where the parameters lie.
      config: which texts.
      rng: key of the run, which with the step decides on the texts.
    """
    self._config, self._rng = config, jax.random.fold_in(rng, 2)
    self._vocabulary = model.output_vocabulary
    prompt = config.encoded_prompt(self._vocabulary)
    # The rows of a batch lie evenly on the devices that share it; spare ones are not shown.
    data = partitioner.mesh.shape[DATA]
    rows = -(-config.num_samples // data) * data
    targets = np.zeros([rows, config.length], np.int32)
    targets[:, : len(prompt)] = prompt
    inputs = np.zeros_like(targets)
    inputs[:, 0] = EOS
    self._batch = jax.device_put(
      {'decoder_target_tokens': targets, 'decoder_input_tokens': inputs},
      partitioner.batch_sharding(),
    )

    def sample(params: Params, batch: Any, rng: jax.Array) -> jax.Array:
      return model.predict_batch_with_aux(
        params, batch, rng, temperature=config.temperature, top_p=config.top_p
      )[0]

    shardings = params_shardings, partitioner.batch_sharding(), None
    self._sample = partitioner.jit(sample, shardings, partitioner.replicated())

  def __call__(self, params: Params, step: int) -> list[str] | np.ndarray:
    """The texts, or the images [N, height, width, 3] uint8, after `step` updates."""
    rng = jax.random.fold_in(self._rng, jnp.int32(step))
    tokens = np.asarray(self._sample(params, self._batch, rng))
    tokens = tokens[: self._config.num_samples]
    if isinstance(self._vocabulary, ImageVocabulary):
      return self._vocabulary.images(tokens)
    texts: list[Any] = [self._vocabulary.decode(row.tolist()) for row in tokens]
    # A vocabulary whose ids stand for no text, as SeqIO's PassThroughVocabulary, returns them.
    return [x if isinstance(x, str) else ' '.join(map(str, x)) for x in texts]
