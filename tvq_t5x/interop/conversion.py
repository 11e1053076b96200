"""What `python -m tvq_t5x.convert` does: checkpoints to folders, and folders to checkpoints."""

import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import seqio
from absl import logging

from tvq_t5x.checkpoints import layout, manager, model_settings
from tvq_t5x.common import files
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import datasets
from tvq_t5x.gin_support import parsing
from tvq_t5x.interop import author, author_files, card, folder
from tvq_t5x.network.sampling import SamplingConfig
from tvq_t5x.standalone import configuration, run_checks
from tvq_t5x.training import placement
from tvq_t5x.training.models import TransformerVQModel, language_model_of
from tvq_t5x.training.partitioning import Partitioner

_MACRO = 'SENTENCEPIECE_MODEL'


class Gin(NamedTuple):
  """What a command was given of gin: arguments of `configuration.configure`."""

  files: Sequence[str] = ()
  bindings: Sequence[str] = ()
  search_paths: Sequence[str] = ()
  modules: Sequence[str] = ()

  @property
  def for_files(self) -> tuple[Sequence[str], ...]:
    """The arguments of `configuration.files_of`."""
    return self.files, self.search_paths, self.modules


def check_output(output: str | None) -> pathlib.Path:
  """The absolute path of the folder to write, which is not there or empty.

  Raises:
    ConfigError: if it can't be that.
  """
  if not output:
    raise ConfigError('no --output was given: give the folder to write.')
  given = f'--output={output}'
  path = files.absolute(output, given)
  files.check_name(path, given)
  if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
    raise ConfigError(f'{given} is there already: give a folder that is not, or is empty.')
  return path


def export(
  checkpoint: str, gin: Gin, output: pathlib.Path, dtype: str, evaluation: str | None
) -> None:
  """Writes the folder of a checkpoint.

  Args:
    checkpoint: as for `configuration.configure`.
    gin: likewise.
    output: from `check_output`.
    dtype: of the arrays, one of `folder.DTYPES`.
    evaluation: a file that `evaluate --json` has written; None means the run's own numbers.

  Raises:
    ConfigError: for what can't be.
    CheckpointError: if the checkpoint can't be read. Nothing is written then.
  """
  configured = configuration.configure(checkpoint, *gin)
  model = language_model_of(configured.model)
  sampling = configuration.setting('sample_cfg') or SamplingConfig()
  numbers = card.of_file(evaluation) if evaluation else []
  loaded = configured.restore()
  numbers = numbers or card.of_run(loaded.checkpoint.parent, loaded.step)
  description = folder.Description(
    model_settings.settings_of(model.config),
    loaded.step,
    layout.data_identity(loaded.checkpoint),
  )
  vocabulary, why_not = model.output_vocabulary, folder.why_not_pytorch(model.config)
  gin = gin._replace(files=configuration.files_of(loaded.checkpoint, *gin.for_files))
  with folder.created(output) as path:
    folder.write_arrays(path, loaded.params, model.config, dtype)
    folder.write_settings(path, model, description, dtype, sampling.top_p)
    page = card.text(
      output.name,
      {**_facts(loaded.params, description), 'vocabulary': folder.vocabulary_name(vocabulary),
       'arrays': dtype},
      numbers,
      why_not is None,
      folder.has_tokenizer(vocabulary),
      sampling.top_p,
    )  # fmt: skip
    (path / folder.CARD).write_text(page, encoding='utf-8')
    extra = []
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
      (path / folder.SENTENCEPIECE).write_bytes(vocabulary.sp_model)
      extra = _vocabulary_bindings(parsing.config_str(), folder.SENTENCEPIECE)
    text = _run_text(gin, extra)
    (path / folder.RUN).write_text(text, encoding='utf-8')
  if why_not is not None:
    logging.warning('The folder has no code for PyTorch: %s.', why_not)
  logging.info('%s is written to %s.', loaded.checkpoint, output)


def _facts(params: Any, description: folder.Description) -> dict[str, Any]:
  settings = description.hyperparameters
  names = (x if isinstance(x, str) else next(iter(x)) for x in settings['sublayers'])
  return {
    'parameters': f'{sum(x.size for x in jax.tree.leaves(params)):,}',
    'sublayers of each layer': ', '.join(names),
    'layers': settings['num_layers'],
    'width': settings['emb_dim'],
    'updates': f'{description.step:,}',
  }


def _vocabulary_bindings(text: str, path: Any) -> list[str]:
  """Settings of gin that make a file the vocabulary of a run, whose configuration is given."""
  if re.search(rf'^{_MACRO}\s*=', text, re.MULTILINE):
    return [f'{_MACRO} = {str(path)!r}']
  return [
    'from __gin__ import dynamic_registration',
    'from tvq_t5x.data import vocabularies',
    f'vocabularies.sentencepiece_model.path = {str(path)!r}',
  ]


def _run_text(gin: Gin, extra: Sequence[str] = ()) -> str:
  """A run as one file of gin, which names no folder of its own; gin holds it afterwards."""
  parsing.parse_gin(gin.files, ["MODEL_DIR = ''", *gin.bindings, *extra], gin.search_paths)
  return parsing.config_str()


def restore(source: str, gin: Gin, output: pathlib.Path) -> None:
  """Writes MODEL_DIR with the checkpoint of an exported folder.

  Args:
    source: the folder.
    gin: of the run; without files, the `config.gin` in the folder, which may name only what a run
      of this package needs.
    output: from `check_output`.

  Raises:
    ConfigError: for what can't be.
    CheckpointError: if the folder can't be read. Nothing is written then.
  """
  path = files.absolute(source, f'--folder={source}')
  if not path.is_dir():
    raise ConfigError(f'--folder={source}: there is no such folder.')
  if not (path / folder.SETTINGS).is_file():
    raise ConfigError(f'--folder={source}: there is no {folder.SETTINGS} in it.')
  description = folder.read_description(path)
  vocabulary, bindings = None, []
  is_own = not gin.files
  gin = gin._replace(files=configuration.files_of(path / folder.ARRAYS, *gin.for_files))
  if is_own and (path / folder.SENTENCEPIECE).is_file():
    vocabulary = path / folder.SENTENCEPIECE
    bindings = _vocabulary_bindings(parsing.read(gin.files[0]), vocabulary)
  model, partitioner = configuration.parse(gin.files, [*gin.bindings, *bindings], gin.search_paths)
  changed, _ = model_settings.differences(
    description.hyperparameters, model_settings.settings_of(model.config)
  )
  if changed:
    raise ConfigError(
      f'--folder={source} is of another model than its {folder.RUN} or --gin_file says: '
      f'{"; ".join(changed[:3])}.'
    )
  abstract = placement.abstract_params(partitioner, model)
  params = folder.read_params(path, abstract, model.config)
  new = _New(model, partitioner, params, description.step, description.data)
  _write_checkpoint(output, gin, new, vocabulary)
  logging.info('%s is written to %s, with a new optimizer.', path, output)


def convert_author(
  checkpoint: str, settings_file: str | None, gin: Gin, output: pathlib.Path
) -> None:
  """Writes MODEL_DIR with a checkpoint of the paper's own code.

  Args:
    checkpoint: his file or folder.
    settings_file: what it was trained with, see `author_files.read_settings`.
    gin: of the run that the model is to be one of; without files, the paper's for his data set.
    output: from `check_output`.

  Raises:
    ConfigError: for what can't be.
    CheckpointError: if the checkpoint can't be read. Nothing is written then.
  """
  if gin.modules:
    raise ConfigError(f'--module={gin.modules[0]} is for a config.gin that is found: leave it out.')
  settings = author_files.read_settings(settings_file)
  saved = author_files.read(checkpoint)
  found = author.convert(saved.params, settings, f'--author_checkpoint={checkpoint}')
  bindings = found.bindings
  if not gin.files:
    gin = gin._replace(files=[author.gin_file(settings)])
    bindings += author.run_bindings(settings)
  gin = gin._replace(bindings=[*bindings, *gin.bindings])
  model, partitioner = configuration.parse(*gin[:3])
  like = placement.abstract_params(partitioner, model)
  params = found.params_like(like, model.config)
  for note in found.notes:
    logging.info('%s', note)
  _write_checkpoint(output, gin, _New(model, partitioner, params, saved.step, {}))
  logging.info('%s is written to %s, with a new optimizer.', saved.path, output)


class _New(NamedTuple):
  """A checkpoint to be written; `data` as in `folder.Description`, empty if nothing is known."""

  model: TransformerVQModel
  partitioner: Partitioner
  params: Any
  step: int
  data: dict[str, Any]


class _NoPosition:
  """Stands for training batches, of which only what they are is saved."""

  def __init__(self, identity: dict[str, Any]):
    self._identity = identity

  def save(self, directory: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = datasets.identity_text(self._identity)
    (directory / datasets.IDENTITY).write_text(text, encoding='utf-8')


def _write_checkpoint(
  output: pathlib.Path, gin: Gin, new: _New, vocabulary: pathlib.Path | None = None
) -> None:
  """Writes MODEL_DIR with `config.gin`, and a vocabulary if it is to be taken from there."""
  settings = configuration.run_settings()
  info = placement.describe(new.partitioner, new.model, settings.batch_size)
  record = run_checks.record_of(settings, info, new.data)
  state = placement.init_state(new.partitioner, new.model, settings.key, settings.batch_size)
  params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new.params, state.params)
  state = state._replace(step=jnp.asarray(new.step, state.step.dtype), params=params)
  bindings = []
  if vocabulary:
    place = output / folder.SENTENCEPIECE
    bindings = _vocabulary_bindings(parsing.config_str(), place)
  text = _run_text(gin, bindings)
  with folder.created(output) as path:
    with manager.Checkpoints(path, None, lambda: None) as checkpoints:
      checkpoints.save(new.step, state, _NoPosition(record['data']), record)
    (path / folder.RUN).write_text(text, encoding='utf-8')
    if vocabulary:
      shutil.copyfile(vocabulary, path / folder.SENTENCEPIECE)
