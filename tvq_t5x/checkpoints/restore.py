"""The parameters of a checkpoint, read for a model that is known."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from tvq_t5x.checkpoints import layout, model_settings
from tvq_t5x.common import named_arrays
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.training import placement
from tvq_t5x.training.base_model import Model, Params
from tvq_t5x.training.partitioning import Partitioner

_TARGET = 'target'  # What the layout calls the parameters.


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model with the parameters of a checkpoint.

  Attributes:
    model: as the gin configuration says.
    params: of `model.module`, float32, laid out by `partitioner`.
    partitioner: the mesh of this machine.
    checkpoint: absolute path of the checkpoint's folder.
    step: parameter updates that it has seen.
  """

  model: Model
  params: Params
  partitioner: Partitioner
  checkpoint: pathlib.Path
  step: int

  @property
  def params_shardings(self) -> Any:
    """Where each parameter lies."""
    return jax.tree.map(lambda x: x.sharding, self.params)


def restore(path: pathlib.Path, model: Model, partitioner: Partitioner) -> Loaded:
  """Reads the parameters of a checkpoint, and nothing else of it.

  Args:
    path: absolute path of the checkpoint's folder.
    model: that it is of.
    partitioner: where the parameters are to lie.

  Raises:
    ConfigError: if it is of another model. Nothing is compiled before.
    CheckpointError: if it can't be read.
  """
  try:
    metadata = layout.read_metadata(path)
    other = layout.other_vocabulary(path, model.data_identity)
    settings = model_settings.settings_of(model.config)
    changed, _ = model_settings.differences(metadata.get('model', settings), settings)
  except Exception as e:  # Whatever a reader of broken files may raise.
    raise layout.unreadable(path, e) from e
  if other:
    raise ConfigError(
      f'--checkpoint={path} was trained with another vocabulary: {other}. Give the one that it was '
      'trained with.'
    )
  params = _restore(path, model, partitioner, metadata)
  for text in changed:
    logging.warning('%s was trained with another setting: %s', path, text)
  logging.info('Read the parameters of %s.', path)
  return Loaded(model, params, partitioner, path, layout.step_of(path))


def _restore(
  path: pathlib.Path,
  model: Model,
  partitioner: Partitioner,
  metadata: Mapping[str, Any],
) -> Params:
  abstract = placement.abstract_params(partitioner, model)
  try:
    saved = layout.param_shapes(path)
  except Exception as e:  # Whatever a reader of broken files may raise.
    raise layout.unreadable(path, e) from e
  if different := named_arrays.differences(saved, named_arrays.shapes(abstract)):
    raise ConfigError(
      f'--checkpoint={path} is of another model than --gin_file and --gin.* say: '
      f'{"; ".join(different)}. Give the settings that it was trained with.'
    )
  try:
    params = layout.restore(path, {_TARGET: abstract})[_TARGET]
    named_arrays.check_values({'params': params}, metadata)
  except Exception as e:
    raise layout.unreadable(path, e) from e
  return params
