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
from tvq_t5x.standalone.configuration import Configured
from tvq_t5x.training import placement
from tvq_t5x.training.models import TransformerVQModel
from tvq_t5x.training.partitioning import Partitioner

_SENTENCEPIECE_MACRO = 'SENTENCEPIECE_MODEL'
_SETTING = re.compile(rf'^{_SENTENCEPIECE_MACRO} = (\\\n\s*)?.*$', re.MULTILINE)


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
  configured: Configured, output: pathlib.Path, dtype: str, evaluation: str | None
) -> None:
  """Writes the folder of a checkpoint.

  Args:
    configured: from `configuration.configure`; gin is still configured in the same way.
    output: from `check_output`.
    dtype: of the arrays, one of `folder.DTYPES`.
    evaluation: a file that `evaluate --json` has written; None means the run's own numbers.

  Raises:
    ConfigError: for what can't be.
    CheckpointError: if the checkpoint can't be read. Nothing is written then.
  """
  model, sampling = configured.model, configuration.setting('sample_cfg') or SamplingConfig()
  numbers = card.of_file(evaluation) if evaluation else []
  loaded = configured.restore()
  model_dir, step = loaded.checkpoint.parent, loaded.step
  numbers = numbers or card.of_run(model_dir, step)
  settings = model_settings.settings_of(model.config)
  identity = layout.data_identity(loaded.checkpoint)
  vocabulary, why_not = model.output_vocabulary, folder.why_not_pytorch(model.config)
  facts = {
    'parameters': f'{sum(x.size for x in jax.tree.leaves(loaded.params)):,}',
    'sublayers of each layer': ', '.join(map(_sublayer_name, settings['sublayers'])),
    'layers': model.config.num_layers,
    'width': model.config.emb_dim,
    'updates': f'{step:,}',
    'vocabulary': folder.vocabulary_name(vocabulary),
    'arrays': dtype,
  }
  with folder.created(output) as path:
    folder.write_arrays(path, loaded.params, model.config, dtype)
    description = folder.Description(settings, step, identity)
    folder.write_settings(path, model, description, dtype, sampling.top_p)
    text = parsing.config_str()
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
      (path / folder.SENTENCEPIECE).write_bytes(vocabulary.sp_model)
      text = _with_sentencepiece(text, folder.SENTENCEPIECE)
    (path / folder.RUN).write_text(text, encoding='utf-8')
    page = card.text(
      output.name, facts, numbers, why_not is None, folder.has_tokenizer(vocabulary), sampling.top_p
    )
    (path / folder.CARD).write_text(page, encoding='utf-8')
  if why_not is not None:
    logging.warning('The folder has no code for PyTorch: %s.', why_not)
  logging.info('%s is written to %s.', loaded.checkpoint, output)


def _sublayer_name(sublayer: Any) -> str:
  return sublayer if isinstance(sublayer, str) else next(iter(sublayer))


def _with_sentencepiece(text: str, path: Any) -> str:
  """A configuration with another path of the vocabulary."""
  return _SETTING.sub(lambda _: f'{_SENTENCEPIECE_MACRO} = {str(path)!r}', text)


def restore(
  source: str,
  output: pathlib.Path,
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  search_paths: Sequence[str],
  modules: Sequence[str],
) -> None:
  """Writes MODEL_DIR with the checkpoint of an exported folder.

  Args:
    source: the folder.
    output: from `check_output`.
    gin_files: of the run; none means the `config.gin` in the folder, which may name only what a run
      of this package needs.
    gin_bindings: more settings.
    search_paths: more folders to look for gin files in.
    modules: of the user, which that `config.gin` may import and call, too.

  Raises:
    ConfigError: for what can't be.
    CheckpointError: if the folder can't be read. Nothing is written then.
  """
  path = files.absolute(source, f'--folder={source}')
  if not (path / folder.SETTINGS).is_file():
    raise ConfigError(f'--folder={source}: there is no {folder.SETTINGS} in it.')
  description = folder.read_description(path)
  own_vocabulary, bindings = path / folder.SENTENCEPIECE, list(gin_bindings)
  if not gin_files:
    gin_files = [configuration.beside(path / folder.ARRAYS, modules)]
    if own_vocabulary.is_file() and _SETTING.search(parsing.read(gin_files[0])):
      bindings.insert(0, f'{_SENTENCEPIECE_MACRO} = {str(own_vocabulary)!r}')
  model, partitioner = configuration.parse(gin_files, bindings, search_paths)
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
  _write_checkpoint(
    output,
    _New(model, partitioner, params, description.step, description.data),
    own_vocabulary if own_vocabulary.is_file() else None,
  )
  logging.info('%s is written to %s, with a new optimizer.', path, output)


def convert_author(
  checkpoint: str,
  settings_file: str | None,
  output: pathlib.Path,
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  search_paths: Sequence[str],
) -> None:
  """Writes MODEL_DIR with a checkpoint of the paper's own code.

  Args:
    checkpoint: his file or folder.
    settings_file: what it was trained with, see `author_files.read_settings`.
    output: from `check_output`.
    gin_files: of the run that the model is to be one of; none means the paper's for his data set.
    gin_bindings: more settings.
    search_paths: more folders to look for gin files in.

  Raises:
    ConfigError: for what can't be.
    CheckpointError: if the checkpoint can't be read. Nothing is written then.
  """
  settings = author_files.read_settings(settings_file)
  saved = author_files.read(checkpoint)
  found = author.convert(saved.params, settings, f'--author_checkpoint={checkpoint}')
  bindings = [f'config.TransformerConfig.{k} = {v!r}' for k, v in found.settings.items()]
  if not gin_files:
    gin_files = [author.gin_file(settings)]
    bindings += author.run_bindings(settings)
  model, partitioner = configuration.parse(gin_files, [*bindings, *gin_bindings], search_paths)
  like = placement.abstract_params(partitioner, model)
  params = found.params_like(like, model.config)
  for note in found.notes:
    logging.info('%s', note)
  _write_checkpoint(output, _New(model, partitioner, params, saved.step, {}))
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
  output: pathlib.Path, new: _New, vocabulary: pathlib.Path | None = None
) -> None:
  """Writes MODEL_DIR with `config.gin` as gin is configured, and a vocabulary."""
  settings = configuration.run_settings()
  info = placement.describe(new.partitioner, new.model, settings.batch_size)
  record = run_checks.record_of(settings, info)
  state = placement.init_state(new.partitioner, new.model, settings.key, settings.batch_size)
  params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new.params, state.params)
  state = state._replace(step=jnp.asarray(new.step, state.step.dtype), params=params)
  text = parsing.config_str()
  if vocabulary:
    text = _with_sentencepiece(text, output / folder.SENTENCEPIECE)
  with folder.created(output) as path:
    with manager.Checkpoints(path, None, lambda: None) as checkpoints:
      checkpoints.save(new.step, state, _NoPosition(new.data or record['data']), record)
    (path / 'config.gin').write_text(text, encoding='utf-8')
    if vocabulary:
      shutil.copyfile(vocabulary, path / folder.SENTENCEPIECE)
