"""Reads checkpoints and settings that the paper's own code has written; executes nothing.

Its branch `main` saves with `flax.training.checkpoints`, a file `checkpoint_N` of msgpack; the
branches `optimized` and `tensor-parallel` with Orbax, a folder `state_N`. An early Orbax has a file
`checkpoint` of msgpack there, in which arrays that lay on several devices are only named: each is a
Zarr array in a folder of that name.
"""

import ast
import json
import math
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from flax import serialization

from tvq_t5x.common import files, named_arrays
from tvq_t5x.common.errors import CheckpointError, ConfigError, reason

_PLACEHOLDER = 'PLACEHOLDER://'
_NEEDED = ('step', 'params')
_MOST_TEXT = 1 << 20  # Bytes of a file of settings.
# An array of numbers is not compressed to less than this part.
_MOST_COMPRESSED = 1000


class Saved(NamedTuple):
  """A checkpoint of the author's.

  Attributes:
    path: of its file or folder.
    step: parameter updates that it has seen.
    params: by his names, with slashes.
  """

  path: pathlib.Path
  step: int
  params: dict[str, np.ndarray]


def read(checkpoint: str) -> Saved:
  """Reads a checkpoint.

  Args:
    checkpoint: a file `checkpoint_N`, a folder `state_N`, or a folder of such ones, of which the
      newest is taken.

  Raises:
    ConfigError: if there is none.
    CheckpointError: if it can't be read.
  """
  path = _find(checkpoint)
  try:
    if path.is_file():
      tree = _read_msgpack(path)
    elif (path / 'checkpoint').is_file():
      tree = _read_msgpack(path / 'checkpoint')
    else:
      tree = _read_orbax(path)
    leaves = named_arrays.leaves_of(tree['params'])
    params = {_plain(name): _array(path, x) for name, x in leaves.items()}
    return Saved(path, int(tree['step']), params)
  except Exception as e:  # Whatever a reader of broken files may raise.
    raise CheckpointError(
      f'The checkpoint {path} can not be read: {reason(e)} Give a complete one that the code of '
      'the paper has written.'
    ) from e


def _find(checkpoint: str) -> pathlib.Path:
  given = f'--author_checkpoint={checkpoint}'
  path = files.absolute(checkpoint, given)
  if path.is_file():
    return path
  numbered = [(int(m[2]), p) for p in _entries(path) if (m := _NAME.fullmatch(p.name))]
  if _NAME.fullmatch(path.name) and path.is_dir():
    return path / 'default' if (path / 'default').is_dir() else path
  if not numbered:
    raise ConfigError(
      f'{given}: there is no checkpoint_N (of the branch main) or state_N (of the others) there.'
    )
  newest = max(numbered)[1]
  return newest / 'default' if (newest / 'default').is_dir() else newest


_NAME = re.compile(r'(checkpoint|state)_(\d+)')


def _entries(path: pathlib.Path) -> list[pathlib.Path]:
  return list(path.iterdir()) if path.is_dir() else []


def _read_msgpack(path: pathlib.Path) -> dict[str, Any]:
  """The needed parts of a file; the state of the optimizer is passed over, and takes no memory."""
  found = {}
  with path.open('rb') as file:
    for name, first, last in _parts(file, path.stat().st_size):
      if name in _NEEDED:
        file.seek(first)
        found[name] = serialization.msgpack_restore(file.read(last - first))
  if missing := [name for name in _NEEDED if name not in found]:
    raise ValueError(f'there is no {missing[0]!r} in it')
  return found


def _parts(file: Any, size: int) -> list[tuple[str, int, int]]:
  """Name, first byte and the one after the last of each part of a file of msgpack.

  Sizes that are said in it are believed only where the file has as many bytes.
  """
  try:
    unpacker = msgpack.Unpacker(file, raw=False, max_buffer_size=max(size, 1))
    parts = []
    for _ in range(unpacker.read_map_header()):
      name = unpacker.unpack()
      first = unpacker.tell()
      unpacker.skip()
      parts.append((name, first, unpacker.tell()))
  except msgpack.OutOfData:
    raise ValueError('it ends too early') from None
  except (ValueError, msgpack.UnpackException) as e:
    raise ValueError(f'it is no msgpack of a train state ({type(e).__name__})') from None
  return parts


def _plain(name: str) -> str:
  """A parameter's name without the box that the branch `tensor-parallel` puts it in."""
  return name.removesuffix('/value')


def _array(path: pathlib.Path, value: Any) -> np.ndarray:
  if isinstance(value, str) and value.startswith(_PLACEHOLDER):
    return _read_zarr(path, value.removeprefix(_PLACEHOLDER))
  array = np.asarray(value)
  if array.dtype.kind not in 'fiu' and array.dtype.name != 'bfloat16':
    raise ValueError('a parameter is no array of numbers')
  return array.astype(np.float32)


def _read_zarr(path: pathlib.Path, name: str) -> np.ndarray:
  folder = path / name
  if folder.parent != path or folder.is_symlink() or not folder.is_dir():
    raise ValueError(f'there is no array {name!r}')
  store = tensorstore.open(
    {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': str(folder)}}, open=True, read=True
  ).result()
  _check_size(name, math.prod(store.shape) * 4, folder)
  return np.asarray(store.read().result(), np.float32)


def _check_size(name: str, size: int, folder: pathlib.Path) -> None:
  """Refuses an array that is said to be much larger than what is on the disk."""
  on_disk = sum(x.stat().st_size for x in folder.rglob('*') if x.is_file())
  if size > _MOST_COMPRESSED * max(on_disk, 1):
    raise ValueError(f'{name} is said to have {size:,} bytes, and has {on_disk:,}')


def _read_orbax(path: pathlib.Path) -> dict[str, Any]:
  """The needed parts of a folder that a later Orbax has written."""
  tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path)).tree
  if missing := [name for name in _NEEDED if name not in tree]:
    raise ValueError(f'there is no {missing[0]!r} in it')
  wanted = {name: tree[name] for name in _NEEDED}
  size = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(wanted))
  _check_size('params', size, path)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
  restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
  args = ocp.args.PyTreeRestore(like, restore_args, partial_restore=True)
  return ocp.PyTreeCheckpointHandler().restore(epath.Path(path), args=args)


def read_settings(path: str | None) -> dict[str, Any]:
  """What a checkpoint was trained with, by the author's names.

  Args:
    path: of a file: JSON; or `scripts/config_NAME.py`, of which each `config.NAME = VALUE` with a
      plain value is read, and nothing is executed; or text with `--NAME=VALUE`, such as the command
      that was run.

  Raises:
    ConfigError: if it is none of these.
  """
  given = f'--author_settings={path or ""}'
  if not path:
    raise ConfigError(
      f'{given}: give a file with the settings that the checkpoint was trained with: JSON, '
      'config_NAME.py, or the command with its --NAME=VALUE.'
    )
  try:
    file = files.absolute(path, given)
    if file.stat().st_size > _MOST_TEXT:
      raise ValueError('the file is too large')
    text = file.read_text(encoding='utf-8')
    if file.suffix == '.json':
      found = json.loads(text)
    else:
      found = dict(_assignments(text) if file.suffix == '.py' else _flags(text))
  except (OSError, ValueError, SyntaxError, RecursionError) as e:
    raise ConfigError(f'{given} can not be read: {reason(e)}') from e
  if not isinstance(found, dict) or not found:
    raise ConfigError(f'{given}: there are no settings in it.')
  return found


def _assignments(text: str) -> Iterator[tuple[str, Any]]:
  for node in ast.walk(ast.parse(text)):
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
      continue
    if isinstance(node.value, ast.Attribute):  # Such as jnp.bfloat16.
      yield node.targets[0].attr, node.value.attr
      continue
    try:
      yield node.targets[0].attr, ast.literal_eval(node.value)
    except ValueError:
      continue


def _flags(text: str) -> Iterator[tuple[str, Any]]:
  for word in shlex.split(text, comments=True):
    name, equals, value = word.removeprefix('--').partition('=')
    if word.startswith('--') and equals and '$' not in value:
      try:
        yield name, ast.literal_eval(value)
      except (SyntaxError, ValueError):
        yield name, value
