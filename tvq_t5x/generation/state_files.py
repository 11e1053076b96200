"""States of generation in files, with what they belong to."""

import functools
import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tvq_t5x.checkpoints import model_settings
from tvq_t5x.checkpoints.restore import Loaded
from tvq_t5x.common import files, named_arrays
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.network import decoding
from tvq_t5x.network.decoding import GenerationState

_ABOUT = 'about'  # The entry that says what a state belongs to.


def save(
  path: str | os.PathLike[str],
  state: GenerationState,
  loaded: Loaded,
  undecoded: Sequence[bytes] | None = None,
) -> None:
  """Writes a state to a file, an .npz archive; replaces it at once.

  Args:
    path: of the file.
    state: of B sequences.
    loaded: what it was made with.
    undecoded: B times `TextDecoder.undecoded`, for `load_undecoded`; None means none.
  """
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
  arrays = {named_arrays.array_name(path): _as_numbers(x) for path, x in leaves}
  about = _about(loaded)
  about['undecoded'] = [x.hex() for x in undecoded or [b''] * len(state.token)]
  try:
    with files.replacing(path) as f:
      np.savez(f, **arrays, **{_ABOUT: np.asarray(json.dumps(about))})
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as e:
    raise ConfigError(f'{path} can not be written: {e.strerror}. Give the path of a file.') from e


def load(path: str | os.PathLike[str], loaded: Loaded) -> GenerationState:
  """Reads a state that `save` wrote.

  Args:
    path: of the file.
    loaded: what it is to be continued with.

  Returns:
    The state, on the host.

  Raises:
    ConfigError: if the file holds none, or one of other parameters.
  """
  try:
    arrays = _arrays(path)
    about = json.loads(str(arrays.pop(_ABOUT)))
    batch_size = len(_undecoded(about))
    _check(path, about, _about(loaded))
  except FileNotFoundError:
    raise ConfigError(f'{path}: there is no such file.') from None
  except ConfigError:
    raise
  except Exception as e:  # Whatever a reader of broken files may raise.
    raise ConfigError(f'{path} is no state of a generation, or not all of one.') from e
  expected = jax.eval_shape(functools.partial(decoding.start, loaded.model.module, batch_size))

  def array(key: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
    found = arrays.get(named_arrays.array_name(key))
    # What is no array is bytes.
    if isinstance(found, np.ndarray) and (found.shape, found.dtype) == (x.shape, _stored(x.dtype)):
      return found.view(x.dtype)
    raise ConfigError(f'{path} is no state of a generation, or not all of one.')

  state = jax.tree_util.tree_map_with_path(array, expected)
  if not np.all((0 <= state.token) & (state.token < loaded.model.config.vocab_size)):
    raise ConfigError(f'{path} is no state of a generation: it ends with a token that is none.')
  return state


def _arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """The arrays of an archive, which take no more memory than it takes on the disk."""
  with zipfile.ZipFile(path) as archive:
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
      raise ValueError('compressed')
  with np.load(path, allow_pickle=False) as archive:
    return dict(archive)


def load_undecoded(path: str | os.PathLike[str]) -> list[bytes]:
  """The bytes with which the texts of a state end, of characters that are not complete.

  Args:
    path: of a file that `load` accepts.
  """
  with np.load(path, allow_pickle=False) as archive:
    return _undecoded(json.loads(str(archive[_ABOUT])))


def _undecoded(about: dict[str, Any]) -> list[bytes]:
  return [bytes.fromhex(x) for x in about['undecoded']]


def _about(loaded: Loaded) -> dict[str, Any]:

  sums = json.dumps(named_arrays.checksums(loaded.params), sort_keys=True)
  return {
    'checkpoint': str(loaded.checkpoint),
    'parameters': hashlib.sha256(sums.encode()).hexdigest(),
    'vocabulary': loaded.model.data_identity,
    'settings': model_settings.settings_of(loaded.model.config),
  }


def _check(path: str | os.PathLike[str], saved: dict[str, Any], ours: dict[str, Any]) -> None:
  from tvq_t5x.data import vocabularies

  old, new = saved['settings'], ours['settings']
  changed, _ = model_settings.differences(old, new)
  if old['dtype'] != new['dtype']:
    changed.append(f'TransformerConfig.dtype = {new["dtype"]!r}, there {old["dtype"]!r}')
  # An earlier version did not say.
  if (vocabulary := saved.get('vocabulary', ours['vocabulary'])) != ours['vocabulary']:
    changed.append(vocabularies.difference(vocabulary, ours['vocabulary']))
  if changed:
    raise ConfigError(f'{path} is a state of another model: {"; ".join(changed)}.')
  if saved['parameters'] != ours['parameters']:
    raise ConfigError(
      f'{path} is a state of {saved["checkpoint"]}: it can not be continued with the parameters of '
      f'{ours["checkpoint"]}.'
    )


def _stored(dtype: np.dtype) -> np.dtype:
  """Bits instead of a dtype that NumPy has no name for: bfloat16."""
  return np.dtype(np.uint16) if dtype.kind == 'V' else dtype


def _as_numbers(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x)
  return x.view(_stored(x.dtype))
