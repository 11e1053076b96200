"""The model and the settings that a gin configuration describes, with or without its checkpoint."""

import copy
import dataclasses
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import gin
from absl import logging

from tvq_t5x.checkpoints import layout, restore
from tvq_t5x.checkpoints.restore import Loaded
from tvq_t5x.common.errors import CheckpointError, ConfigError
from tvq_t5x.gin_support import found, parsing
from tvq_t5x.standalone.run_settings import RunSettings
from tvq_t5x.training import placement
from tvq_t5x.training.base_model import Model
from tvq_t5x.training.partitioning import DATA, Partitioner

_OF_T5X = re.compile(r'^(?:from t5x |import t5x|import __main__)', re.MULTILINE)


class Configured(NamedTuple):
  """A checkpoint and what the gin configuration says of it, before it is read."""

  given: str  # What was given for it, as to `configure`.
  flag: str  # Or argument, that it was given with.
  checkpoint: pathlib.Path  # Absolute path of its folder.
  model: Model
  partitioner: Partitioner

  def restore(self) -> Loaded:
    """Reads the parameters; see `checkpoints.restore`.

    If a run's folder was given, one that can't be read is named, and the newest of the others is
    taken, as a run that still trains removes checkpoints and writes new ones.
    """
    tried = [self.checkpoint]
    while True:
      try:
        return restore.restore(tried[-1], self.model, self.partitioner)
      except CheckpointError as e:
        left = [path for path in self._candidates() if path not in tried]
        if not left:
          raise
        logging.warning('%s is taken instead. %s', left[0], e)
        tried.append(left[0])

  def _candidates(self) -> list[pathlib.Path]:
    return layout.candidates(self.given, f'{self.flag}={self.given}')


def load(
  checkpoint: str,
  gin_files: Sequence[str] = (),
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  modules: Sequence[str] = (),
) -> Loaded:
  """`configure` and `Configured.restore` in one, for callers without flags."""
  return configure(
    checkpoint, gin_files, gin_bindings, search_paths, modules, flag='checkpoint'
  ).restore()


def configure(
  checkpoint: str,
  gin_files: Sequence[str] = (),
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  modules: Sequence[str] = (),
  flag: str = '--checkpoint',
) -> Configured:
  """Parses the gin files of a checkpoint's run, in place of the configuration that gin holds now.

  Args:
    checkpoint: as for `layout.candidates`.
    gin_files: of the run that wrote it; none means the `config.gin` that the standalone runner
      left in MODEL_DIR, which may name only what a run of this package needs.
    gin_bindings: more settings, such as 'NUM_PARTITIONS = 2' for another mesh than the run's.
    search_paths: more folders to look for gin files in.
    modules: of the user, which that `config.gin` may import and call, too.
    flag: that names the checkpoint, for messages.

  Raises:
    ConfigError: if there is no checkpoint, or a setting is wrong; also where the parameters do not
      fit on this machine's devices evenly.
  """
  path = layout.find(checkpoint, f'{flag}={checkpoint}')
  gin_files = files_of(path, gin_files, search_paths, modules)
  return Configured(checkpoint, flag, path, *parse(gin_files, gin_bindings, search_paths))


def parse(
  gin_files: Sequence[str], gin_bindings: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> tuple[Model, Partitioner]:
  """The model and the mesh that gin files describe, in place of what gin holds now.

  Raises:
    ConfigError: if a setting is wrong; also where the parameters do not fit on this machine's
      devices evenly.
  """
  # Nothing is written, so a run without a folder is complete.
  parsing.parse_gin(gin_files, ["MODEL_DIR = ''", *gin_bindings], search_paths)
  model: Model = setting('model')
  partitioner: Partitioner = setting('partitioner')
  placement.validate(partitioner, model.config, partitioner.mesh.shape[DATA])
  return model, partitioner


def files_of(
  path: pathlib.Path,
  gin_files: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  modules: Sequence[str] = (),
) -> Sequence[str]:
  """The given gin files, or else the `config.gin` beside a path, which names only what it may.

  Args:
    path: of a checkpoint, or of anything else beside a `config.gin`, which may be someone else's.
    gin_files: that were given.
    search_paths: for them.
    modules: of the user, which that `config.gin` may import and call besides this package's own.

  Raises:
    ConfigError: if there is none of ours, or it names something else; also for arguments that are
      of no use.
  """
  if gin_files and modules:
    raise ConfigError(
      f'--module={modules[0]} is for the config.gin in MODEL_DIR, and --gin_file={gin_files[0]} is '
      'read in place of it: leave one of them out.'
    )
  if gin_files:
    return gin_files
  if search_paths:
    raise ConfigError(
      f'--gin_search_paths={",".join(search_paths)}: the config.gin in MODEL_DIR includes no '
      'files; leave it out, or give a --gin_file.'
    )
  for module in modules:
    if not _is_there(module):
      raise ConfigError(f'--module={module}: there is no such module on PYTHONPATH.')
  found_file = _config_beside(path)
  found.check(parsing.read(found_file), found_file, modules)
  return [found_file]


def _is_there(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except (ImportError, ValueError):  # No parent, or no name of a module.
    return False


def run_settings() -> RunSettings:
  """The run that the parsed gin configuration describes.

  Raises:
    ConfigError: if it describes none, or not all of one.
  """
  _bound()
  return gin.get_configurable(RunSettings)()


def setting(name: str) -> Any:
  """A field of `run_settings`, without building the others.

  Raises:
    ConfigError: as `run_settings`.
  """
  bound = _bound()
  # gin builds what a reference stands for as it copies.
  return copy.deepcopy(bound[name]) if name in bound else getattr(RunSettings, name)


def _bound() -> dict[str, Any]:
  """What gin gives the fields of `RunSettings`, unbuilt; all that have no default are there."""
  if not parsing.is_bound(RunSettings):
    raise ConfigError(
      'the gin files describe no run: give the one that was trained, which includes '
      "'gin/runs/pretrain.gin'"
    )
  bound = gin.get_bindings(RunSettings, resolve_references=False)
  names = [f.name for f in dataclasses.fields(RunSettings)]
  if missing := [n for n in names if n not in bound and not hasattr(RunSettings, n)]:
    raise ConfigError(
      f'the gin files describe a run without {", ".join(f"train.{n}" for n in missing)}: include '
      "'gin/runs/pretrain.gin', or set what is missing"
    )
  return bound


def _config_beside(checkpoint: pathlib.Path) -> str:
  path = checkpoint.parent / 'config.gin'
  if not path.is_file():
    why = f'{checkpoint.parent} has no config.gin'
  elif _OF_T5X.search(parsing.read(str(path))):
    why = f'{path} was written by T5X, and no other program can read it'
  else:
    return str(path)
  raise ConfigError(f'{why}: give the gin file of the run with --gin_file, and its settings.')
