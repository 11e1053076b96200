"""The parameters of a checkpoint, and the model that a gin configuration says they belong to."""

import copy
import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gin
import jax
from absl import logging

from tvq_t5x import checkpoint_layout as layout
from tvq_t5x import gin_utils, model_settings, named_arrays
from tvq_t5x.errors import ConfigError
from tvq_t5x.models import Params, TransformerVQModel
from tvq_t5x.partitioning import DATA, Partitioner
from tvq_t5x.standalone import runner

_TARGET = 'target'  # What the layout calls the parameters.
_OF_T5X = re.compile(r'^(?:from t5x |import t5x|import __main__)', re.MULTILINE)


class Configured(NamedTuple):
  """A checkpoint and what the gin configuration says of it, before it is read."""

  checkpoint: pathlib.Path  # Absolute path of its folder.
  model: TransformerVQModel
  partitioner: Partitioner


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

  model: TransformerVQModel
  params: Params
  partitioner: Partitioner
  checkpoint: pathlib.Path
  step: int

  @property
  def params_shardings(self) -> Any:
    """Where each parameter lies."""
    return jax.tree.map(lambda x: x.sharding, self.params)


def load(
  checkpoint: str,
  gin_files: Sequence[str] = (),
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
) -> Loaded:
  """`configure` and `restore` in one."""
  return restore(configure(checkpoint, gin_files, gin_bindings, search_paths))


def configure(
  checkpoint: str,
  gin_files: Sequence[str] = (),
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
) -> Configured:
  """Parses the gin files of a checkpoint's run, in place of the configuration that gin holds now.

  Args:
    checkpoint: as for `checkpoint_layout.find`.
    gin_files: of the run that wrote it; none means the `config.gin` that the standalone runner
      left in MODEL_DIR.
    gin_bindings: more settings, such as 'NUM_PARTITIONS = 2' for another mesh than the run's.
    search_paths: more folders to look for gin files in.

  Raises:
    ConfigError: if there is no checkpoint, or a setting is wrong; also where the parameters do not
      fit on this machine's devices evenly.
  """
  path = layout.find(checkpoint, '--checkpoint')
  # Nothing is written, so a run without a folder is complete.
  bindings = ["MODEL_DIR = ''", *gin_bindings]
  gin_utils.parse_gin(gin_files or [_config_beside(path)], bindings, search_paths)
  model: TransformerVQModel = setting('model')
  partitioner: Partitioner = setting('partitioner')
  partitioner.validate(model.config, partitioner.mesh.shape[DATA])
  return Configured(path, model, partitioner)


def restore(configured: Configured) -> Loaded:
  """Reads the parameters of a checkpoint, and nothing else of it.

  Raises:
    ConfigError: if it is of another model. Nothing is compiled before.
    CheckpointError: if it can't be read.
  """
  path, model, partitioner = configured
  try:
    metadata = layout.read_metadata(path)
  except (OSError, ValueError) as e:
    raise layout.unreadable(path, e) from e
  params = _restore(path, model, partitioner, metadata)
  if metadata:
    settings = model_settings.settings_of(model.config)
    changed, _ = model_settings.differences(metadata['model'], settings)
    for text in changed:
      logging.warning('%s was trained with another setting: %s', path, text)
  logging.info('Read the parameters of %s.', path)
  return Loaded(model, params, partitioner, path, layout.step_of(path))


def setting(name: str) -> Any:
  """What the parsed gin configuration gives `runner.train` for a parameter, built.

  Raises:
    ConfigError: if it configures no run.
  """
  if not gin_utils.is_bound(runner.train):
    raise ConfigError(
      'the gin files describe no run: give the one that was trained, which includes '
      "'gin/runs/pretrain.gin'"
    )
  # gin.get_bindings would build all of them; gin builds what a reference stands for as it copies.
  return copy.deepcopy(gin.get_bindings(runner.train, resolve_references=False)[name])


def _config_beside(checkpoint: pathlib.Path) -> str:
  path = checkpoint.parent / 'config.gin'
  if not path.is_file():
    why = f'{checkpoint.parent} has no config.gin'
  elif _OF_T5X.search(path.read_text(encoding='utf-8')):
    why = f'{path} was written by T5X, and no other program can read it'
  else:
    return str(path)
  raise ConfigError(f'{why}: give the gin file of the run with --gin_file, and its settings.')


def _restore(
  path: pathlib.Path,
  model: TransformerVQModel,
  partitioner: Partitioner,
  metadata: Mapping[str, Any],
) -> Params:
  abstract = partitioner.abstract_params(model)
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
