"""An exported folder: arrays in safetensors, settings as JSON, and the code of a PyTorch model."""

import contextlib
import importlib.resources
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import seqio

from tvq_t5x.checkpoints import model_settings
from tvq_t5x.common.errors import CheckpointError, ConfigError, is_count, reason
from tvq_t5x.common.tokens import EOS, PAD
from tvq_t5x.data import vocabularies
from tvq_t5x.interop import arrays
from tvq_t5x.network.config import Sublayer, TransformerConfig
from tvq_t5x.training.models import TransformerVQModel

ARRAYS, SETTINGS, RUN, CARD = 'model.safetensors', 'config.json', 'config.gin', 'README.md'
SENTENCEPIECE = 'sentencepiece.model'
# Of this layout; a later version that reads older ones has a higher one.
FORMAT_VERSION = 1
DTYPES = ('float32', 'bfloat16')

_OURS, _HYPERPARAMETERS = 'tvq_t5x', 'hyperparameters'
_CODE = 'tvq_t5x.interop.hugging_face'
_CODE_FILES = ('configuration_transformer_vq.py', 'modeling_transformer_vq.py')
_TOKENIZER_FILE = 'tokenization_transformer_vq.py'
_MOST_JSON = 1 << 24  # Bytes.


class Description(NamedTuple):
  """What `config.json` says of a model.

  Attributes:
    hyperparameters: as `model_settings.settings_of` has them.
    step: parameter updates that it has seen.
    data: the `datasets.identity` of what it was trained on, as far as that is known.
  """

  hyperparameters: dict[str, Any]
  step: int
  data: dict[str, Any]


@contextlib.contextmanager
def created(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write to, which takes the name of `path` once all of it is written."""
  temporary = path.with_name(f'{path.name}.incomplete-{os.getpid()}')
  try:
    temporary.mkdir(parents=True)
  except OSError as e:
    raise ConfigError(f'--output={path} can not be written: {reason(e)}') from e
  try:
    yield temporary
    if path.exists():
      path.rmdir()  # It was found to be empty.
    os.replace(temporary, path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def write_arrays(path: pathlib.Path, params: Any, config: TransformerConfig, dtype: str) -> None:
  """Writes parameters.

  Args:
    path: of the folder.
    params: float32.
    config: of the model.
    dtype: one of DTYPES, but for codebooks and state-space layers, which stay float32.
  """
  found = arrays.by_name(params, config)
  if dtype == 'bfloat16':
    found = {
      name: x if arrays.is_always_float32(name) else x.astype(ml_dtypes.bfloat16)
      for name, x in found.items()
    }
  found = {name: np.asarray(x, order='C') for name, x in found.items()}
  safetensors.numpy.save_file(found, path / ARRAYS, metadata={'format': 'pt'})


def write_settings(
  path: pathlib.Path, model: TransformerVQModel, description: Description, dtype: str, top_p: float
) -> None:
  """Writes `config.json`, and where PyTorch can run the model, the code and settings for it."""
  settings: dict[str, Any] = {
    'model_type': 'transformer_vq',
    'dtype': dtype,
    'bos_token_id': EOS,
    'eos_token_id': EOS,
    'pad_token_id': PAD,
  }
  if why_not_pytorch(model.config) is None:
    settings |= {
      'architectures': ['TransformerVQForCausalLM'],
      'auto_map': {
        'AutoConfig': 'configuration_transformer_vq.TransformerVQConfig',
        'AutoModelForCausalLM': 'modeling_transformer_vq.TransformerVQForCausalLM',
      },
    }
    _copy_code(path, _CODE_FILES)
    _write_json(path / 'generation_config.json', _generation(model, top_p))
    _write_tokenizer(path, model.output_vocabulary)
  settings[_HYPERPARAMETERS] = description.hyperparameters
  settings[_OURS] = {
    'format_version': FORMAT_VERSION,
    'step': description.step,
    'vocabulary': vocabularies.identity(model.output_vocabulary),
    'data': description.data,
  }
  _write_json(path / SETTINGS, settings)
  # safetensors leaves its file to the one who wrote it.
  shutil.copymode(path / SETTINGS, path / ARRAYS)


def why_not_pytorch(config: TransformerConfig) -> str | None:
  """Why a model has no code for PyTorch; None if it has."""
  for sublayer in model_settings.settings_of(config)['sublayers']:
    ((name, settings),) = sublayer.items() if isinstance(sublayer, dict) else [(sublayer, {})]
    if name not in list(Sublayer):
      return f'{name} is a mixer of your own'
    if settings.get('bidirectional'):
      return 'bidirectional blocks write no text'
  return None


def has_tokenizer(vocabulary: seqio.Vocabulary) -> bool:
  """Whether there is a tokenizer for PyTorch."""
  is_bytes = type(vocabulary) is seqio.ByteVocabulary
  return is_bytes or isinstance(vocabulary, seqio.SentencePieceVocabulary)


def vocabulary_name(vocabulary: seqio.Vocabulary) -> str:
  """What a vocabulary is, for a page."""
  if isinstance(vocabulary, seqio.SentencePieceVocabulary):
    return f'SentencePiece, {vocabulary.vocab_size:,} pieces'
  return vocabularies.identity(vocabulary)


def _generation(model: TransformerVQModel, top_p: float) -> dict[str, Any]:
  """Settings of `generate`: as samples of the run are drawn, without ids that stand for nothing."""
  suppressed = np.flatnonzero(~model.sampled_ids).tolist()
  special = {'bos_token_id': EOS, 'eos_token_id': EOS, 'pad_token_id': PAD}
  sampling = {'do_sample': True, 'top_k': 0, 'top_p': top_p}
  return {**special, 'suppress_tokens': suppressed, **sampling}


def _write_tokenizer(path: pathlib.Path, vocabulary: seqio.Vocabulary) -> None:
  if not has_tokenizer(vocabulary):
    return
  _copy_code(path, [_TOKENIZER_FILE])
  name = f'{_TOKENIZER_FILE.removesuffix(".py")}.TransformerVQTokenizer'
  _write_json(
    path / 'tokenizer_config.json',
    {'tokenizer_class': 'TransformerVQTokenizer', 'auto_map': {'AutoTokenizer': [name, None]}},
  )


def _copy_code(path: pathlib.Path, names: Any) -> None:
  folder = importlib.resources.files(_CODE)
  for name in names:
    (path / name).write_bytes((folder / name).read_bytes())


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  path.write_text(f'{json.dumps(content, indent=2)}\n', encoding='utf-8')


def read_description(path: pathlib.Path) -> Description:
  """Reads `config.json`, field by field.

  Raises:
    CheckpointError: if it can't be read, is something else, or of a later version.
  """
  file = path / SETTINGS
  try:
    if file.stat().st_size > _MOST_JSON:
      raise ValueError(f'{SETTINGS} has more than {_MOST_JSON:,} bytes')
    found = json.loads(file.read_text(encoding='utf-8'))
    ours = found.get(_OURS) if isinstance(found, dict) else None
    if not isinstance(ours, dict) or not is_count(ours.get('format_version')):
      raise ValueError(f'its {SETTINGS} was not written by tvq_t5x.convert')
    if ours['format_version'] > FORMAT_VERSION:
      raise ValueError(
        f'its format version is {ours["format_version"]}, and this program knows '
        f'{FORMAT_VERSION}: a later version of tvq_t5x has written it'
      )
    return Description(*_fields(found, ours))
  except Exception as e:  # Whatever a reader of broken files may raise.
    raise unreadable(path, e) from e


def _fields(found: dict[str, Any], ours: dict[str, Any]) -> tuple[Any, ...]:
  hyperparameters, step = found.get(_HYPERPARAMETERS), ours.get('step')
  if not model_settings.is_complete(hyperparameters):
    raise ValueError(f'the field {_HYPERPARAMETERS!r} in its {SETTINGS} is wrong')
  if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**31:
    raise ValueError(f"the field 'step' in its {SETTINGS} is wrong")
  data = ours.get('data', {})
  if not isinstance(data, dict):
    raise ValueError(f"the field 'data' in its {SETTINGS} is wrong")
  return hyperparameters, step, data


def unreadable(path: pathlib.Path, error: Exception) -> CheckpointError:
  """What to say of a folder that can't be read."""
  return CheckpointError(f'The folder {path} can not be read: {reason(error)} Give another one.')


def read_params(path: pathlib.Path, like: Any, config: TransformerConfig) -> Any:
  """Reads parameters, whose shapes are compared with the model's before any is read.

  Args:
    path: of the folder.
    like: shapes of the parameters.
    config: of the model.

  Returns:
    Nested dicts of float32 arrays.

  Raises:
    ConfigError: if they are of another model.
    CheckpointError: if they can't be read.
  """
  expected = arrays.shapes(like, config)
  try:
    with safetensors.safe_open(path / ARRAYS, 'numpy') as file:
      headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no dict.
      found = {name: header.get_shape() for name, header in headers.items()}
      if different := arrays.differences(found, expected):
        raise ConfigError(
          f'--folder={path} is of another model than its {RUN} says: {"; ".join(different)}.'
        )
      _check_dtypes({name: header.get_dtype() for name, header in headers.items()})
      return arrays.to_params(like, config, file.get_tensor)
  except ConfigError:
    raise
  except Exception as e:  # Whatever a reader of broken files may raise.
    raise unreadable(path, e) from e


def _check_dtypes(found: Mapping[str, str]) -> None:
  for name, dtype in found.items():
    if dtype not in ('F32', 'BF16') or (dtype != 'F32' and arrays.is_always_float32(name)):
      raise ValueError(f'{name} in its {ARRAYS} has the dtype {dtype}')
