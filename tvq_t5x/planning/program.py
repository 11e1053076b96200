"""The program that a gin configuration trains with, without its data."""

from collections.abc import Sequence
from typing import NamedTuple

import gin
import jax
import seqio

from tvq_t5x.gin_support import parsing
from tvq_t5x.network.transformer import Transformer
from tvq_t5x.standalone import configuration
from tvq_t5x.training import compilation, placement, run_limits
from tvq_t5x.training.base_model import Model
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.partitioning import Partitioner


class Program(NamedTuple):
  """What trains on a batch in one call, in one or several steps (parameter updates)."""

  model: Model
  partitioner: Partitioner
  batch_size: int
  length: int  # Tokens of a sequence.
  update_len: int
  num_microbatches: int
  segment_len: int | None  # Tokens of a sequence that are held at once; None means update_len.

  @property
  def num_updates(self) -> int:
    """Parameter updates that a batch gives."""
    return self.length // self.update_len

  @property
  def num_tokens(self) -> int:
    """Tokens of a batch, of all devices."""
    return self.batch_size * self.length


def configured_program(devices: Sequence[jax.Device]) -> Program:
  """What the parsed gin configuration trains, on these devices.

  Reads neither text nor vocabulary.

  Raises:
    ConfigError: for settings that do not fit together.
  """
  model = _configured_model()
  partitioner = gin.get_configurable(Partitioner)(devices=devices)
  data = configuration.setting('train_dataset_cfg')
  length = data.task_feature_lengths[model.LENGTH_FEATURE]
  update_len, segment_len = map(configuration.setting, ('update_len', 'segment_len'))
  updates = run_limits.updates_in_batch(length, model.config, update_len)
  run_limits.check_segment_len(segment_len, length, updates, model.config)
  num_microbatches = configuration.setting('num_microbatches')
  placement.validate(partitioner, model.config, data.batch_size, num_microbatches)
  placement.validate_length(partitioner, model.config, segment_len or length // updates)
  return Program(
    model,
    partitioner,
    data.batch_size,
    length,
    length // updates,
    num_microbatches,
    segment_len,
  )


def _configured_model() -> Model:
  """The model; one of language without its vocabulary, which may not be there."""
  if not parsing.is_bound(Transformer):
    return configuration.setting('model')
  module = gin.get_configurable(Transformer)()
  vocabulary = seqio.PassThroughVocabulary(module.config.vocab_size)
  return gin.get_configurable(TransformerVQModel)(module=module, vocabulary=vocabulary)


def compile_program(program: Program) -> jax.stages.Compiled:
  """Compiles what the training loop runs.

  Raises:
    jax.errors.JaxRuntimeError: if the temporaries alone do not fit into the devices' memory.
  """
  return compilation.lower_train_step(**program._asdict()).compile()
