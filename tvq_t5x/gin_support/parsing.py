"""Reads gin files and `--gin.NAME=VALUE` arguments, and says plainly what is wrong with them."""

import ast
import contextlib
import glob
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import gin

from tvq_t5x.common.errors import CheckpointError, ConfigError, TrainingDiverged
from tvq_t5x.gin_support import bindings, origins, private
from tvq_t5x.gin_support.checks import suggest

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Folders of modules that gin files once imported from the package itself, as the `config.gin` of
# an old run does.
_FOLDERS = {
  'config': 'network',
  'datasets': 'data',
  'models': 'training',
  'optimizers': 'training',
  'partitioning': 'training',
  'token_cache': 'data',
  'transformer': 'network',
  'vocabularies': 'data',
}
# What gin raises, by way of Python, on a file it can't use.
_GIN_ERRORS = (
  AttributeError,
  ImportError,
  KeyError,
  NameError,
  OSError,
  SyntaxError,
  ValueError,
  tokenize.TokenError,
)

_OUR_ERRORS = (ConfigError, CheckpointError, TrainingDiverged)


def gin_root() -> str:
  """This project's `gin/` folder: inside the package in a wheel, beside it in a checkout."""
  installed = os.path.join(_PACKAGE, 'gin')
  return installed if os.path.isdir(installed) else os.path.join(os.path.dirname(_PACKAGE), 'gin')


def parse_gin(
  gin_files: Sequence[str], gin_bindings: Sequence[str], search_paths: Sequence[str] = ()
) -> None:
  """Replaces gin's configuration by the given one, checks it and locks it.

  Files are looked up in `<gin root>/standalone`, the working directory, `search_paths` and the
  folder that holds `gin/`, in this order, and so are the files that they include. An
  `include 'gin/runs/pretrain.gin'` thus means this project's own runner here, and T5X's under T5X.

  Args:
    gin_files: Paths, read in order: what a later one sets holds.
    gin_bindings: `NAME=VALUE` settings, applied after the files.
    search_paths: More folders to look in.

  Raises:
    ConfigError: For a file, a setting or a value that can't be used.
  """
  folders = _search_folders(search_paths)
  for path in search_paths:
    if not os.path.isdir(path):
      raise ConfigError(f'--gin_search_paths={path}: there is no such folder')
  for path in gin_files:
    if not _is_found(path, folders):
      raise ConfigError(f'--gin_file={path}: no such file{_near_files(path, folders)}')
  for binding in gin_bindings:
    if binding.startswith('-'):
      raise ConfigError(f"{binding}: give a setting as 'NAME = VALUE', without --gin before it")
    _check_quotes(binding)
  gin.clear_config()
  with private.files_read_from(folders, _open, _in_package):
    for path in gin_files:
      with _explained(path, folders):
        gin.parse_config_file(path)
    with _explained('command line', folders):
      gin.parse_config(list(gin_bindings))
  gin.finalize()


def rewrite_gin_args(args: Sequence[str]) -> list[str]:
  """Turns each `--gin.NAME=VALUE` into the flag `--gin_bindings=NAME = VALUE`, as T5X does."""
  return [_rewrite_gin_arg(arg) for arg in args]


def config_str() -> str:
  """The configuration as gin code that can be parsed again."""
  return gin.config_str()


def is_bound(function: Callable[..., Any]) -> bool:
  """Whether the configuration says anything about `function`."""
  try:
    return bool(gin.get_bindings(function, resolve_references=False))
  except ValueError:  # No gin file names it.
    return False


def message(error: BaseException) -> str:
  """The message of an error, for who wrote the gin files.

  It says what sets the settings that it names, and has lost what gin appends to it on its way
  through configurables.
  """
  text = re.sub(r'\n  In call to configurable .*', '', str(error), flags=re.DOTALL)
  return origins.with_origins(text)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
  """Gives the errors of this package that pass their `message`, for callers from Python.

  gin raises those of what it calls as instances of a class that can't be created anew.
  """
  try:
    yield
  except _OUR_ERRORS as e:
    kind = next(c for c in type(e).__mro__ if c in _OUR_ERRORS)
    raise kind(message(e)) from None


def _rewrite_gin_arg(arg: str) -> str:
  if not arg.startswith('--gin.'):
    return arg
  name, equals, value = arg.removeprefix('--gin.').partition('=')
  if not equals:
    raise ConfigError(f'{arg} has no value: write {arg}=VALUE, without spaces')
  binding = f'{name} = {value}'
  _check_quotes(binding)
  return f'--gin_bindings={binding}'


def _check_quotes(binding: str) -> None:
  """Refuses text without quotes, which the shell takes away from `--gin.NAME="text"`."""
  parts = re.fullmatch(r'\s*([\w./]+)\s*=\s*(.*?)\s*', binding, re.DOTALL)
  if not parts:
    return
  name, value = parts.groups()
  if not value:
    raise ConfigError(f'--gin.{name}= has no value: an empty text is --gin.{name}=\\"\\"')
  if value[0] in '\'"@%[({':
    _check_closed(name, value)
    return
  try:
    ast.literal_eval(value)
  except (SyntaxError, ValueError):
    meant = value.capitalize()
    meant = meant if meant in ('True', 'False', 'None') else f'\\"{value}\\"'
    raise ConfigError(
      f'--gin.{name}={value}: not a number, True, False, None or text in quotes that the shell '
      f'leaves in place; write --gin.{name}={meant}'
    ) from None


def _check_closed(name: str, value: str) -> None:
  try:
    list(tokenize.generate_tokens(io.StringIO(value).readline))
  except tokenize.TokenError:
    raise ConfigError(
      f'--gin.{name}={value}: a bracket is not closed; keep the shell from splitting the value: '
      f"'--gin.{name}=VALUE'"
    ) from None


def _search_folders(search_paths: Sequence[str]) -> list[str]:
  root = gin_root()
  given = map(os.path.expanduser, search_paths)
  return [os.path.join(root, 'standalone'), '', *given, os.path.dirname(root)]


def read(path: str) -> str:
  """The text of a gin file, with the imports of today.

  Raises:
    ConfigError: if it is no UTF-8.
  """
  with open(path, 'rb') as f:
    content = f.read()
  try:
    text = io.TextIOWrapper(io.BytesIO(content), encoding='utf-8-sig').read()
  except UnicodeDecodeError as e:
    line = content.count(b'\n', 0, e.start) + 1
    raise ConfigError(f'{path}, line {line}: the file is no UTF-8; save it as UTF-8.') from None

  def today(line: re.Match[str]) -> str:
    folder = _FOLDERS.get(line[1])
    return f'from tvq_t5x.{folder} import {line[1]}' if folder else line[0]

  return re.sub(r'^from tvq_t5x import (\w+)', today, text, flags=re.MULTILINE)


def _open(path: str) -> IO[str]:
  found = io.StringIO(read(path))
  found.name = path  # gin shows it in its messages.
  return found


def _in_package(path: str) -> str:
  """Where the file `package/folder/name.gin` of an installed package is, or ''."""
  folder, name = os.path.split(path)
  try:
    spec = None if os.path.isabs(path) else importlib.util.find_spec(folder.replace('/', '.'))
  except (ImportError, ValueError):
    spec = None
  found = os.path.join(os.path.dirname(spec.origin), name) if spec and spec.origin else ''
  return found if os.path.isfile(found) else ''


def _is_found(path: str, folders: Sequence[str]) -> bool:
  return bool(_in_package(path)) or any(os.path.isfile(os.path.join(f, path)) for f in folders)


def _near_files(path: str, folders: Sequence[str]) -> str:
  folder = os.path.dirname(path)
  beside = [
    os.path.join(folder, os.path.basename(found))
    for prefix in folders
    for found in glob.glob(os.path.join(glob.escape(os.path.join(prefix, folder)), '*.gin'))
  ]
  root = gin_root()
  ours = [
    os.path.join('gin', found)
    for found in glob.glob('**/*.gin', root_dir=root, recursive=True)
    if not found.startswith('standalone' + os.sep)
  ]
  searched = ', '.join(os.path.abspath(f) for f in dict.fromkeys(folders))
  where = '' if os.path.isabs(path) else f'; searched {searched}'
  return suggest(path, beside + ours) + where


@contextlib.contextmanager
def _explained(source: str, folders: Sequence[str]) -> Iterator[None]:
  try:
    yield
  except _GIN_ERRORS as error:
    if not _is_refusal(error):
      raise
    raise ConfigError(_explain(error, source, folders)) from error


def _is_refusal(error: BaseException) -> bool:
  """Whether gin raised `error`, rather than a module that a gin file imports."""
  if isinstance(error, ImportError | tokenize.TokenError):
    return True
  frame = error.__traceback__
  while frame and frame.tb_next:
    frame = frame.tb_next
  raised_in = frame.tb_frame.f_globals.get('__name__', '') if frame else ''
  return raised_in == 'tokenize' or raised_in.split('.')[0] == 'gin'


def _explain(error: Exception, source: str, folders: Sequence[str]) -> str:
  """gin's own message on one line: where, what, and what was probably meant."""
  if isinstance(error, tokenize.TokenError):
    return f'{source}: a bracket or quote is not closed ({error.args[0]})'
  if isinstance(error, SyntaxError):
    what, file, line, text = error.msg, error.filename, error.lineno, error.text
    what = what.strip().split('\n')[-1].strip()
  else:
    what = str(error).strip('"').split('\n')[0].strip('"').replace('\\n', '')
    what = re.sub(r'\. Searched config paths.*', '', what)
    # gin appends such a place for each include that leads to the line.
    place = re.search(r'\n  In (?:file "(.*)",|bindings string) line (\d+)\n    (.*)', str(error))
    file, line, text = place.groups() if place else (None, None, None)
  source = f'{file}, line {line}' if file else source
  text = f' (`{text.strip()}`)' if text else ''
  return f'{source}{text}: {what.rstrip(".")}{_meant(what, file, text, folders)}'


def _meant(what: str, file: str | None, text: str, folders: Sequence[str]) -> str:
  if found := re.search(r"Configurable '(.+)' doesn't have a parameter named '(.+)'", what):
    names = _parameters(found[1])
    return f'{suggest(found[2], names)}; accepted: {", ".join(names)}'
  if found := re.search(r"<(?:module|class) '([\w.]+)'.* has no attribute (\w+)", what):
    return suggest(found[2], _attributes(found[1]))
  if found := re.search(r"No configurable matching (?:reference )?'@?([\w.]+)", what):
    parts = found[1].count('.') + 1
    return suggest(found[1], ('.'.join(name.split('.')[-parts:]) for name in private.registered()))
  if found := re.search(r"'(\w+)' was not provided by an import statement", what):
    return suggest(found[1], _imported_names(file))
  found = re.search(r"No module named '([\w.]+)'", what)
  if found and found[1].split('.')[-1] in text:  # Not one that an imported module lacks.
    return suggest(found[1], _modules_beside(found[1]))
  if re.match('Failed to parse token|Unable to parse value', what):
    return '; accepted: a number, True, False, None, quoted text, @reference, %MACRO'
  if found := re.match(r'Unable to open file: (.+)', what):
    return _near_files(found[1], folders)
  return ''


def _parameters(selector: str) -> list[str]:
  """The parameters of what a gin file calls `selector`, which may be an alias."""
  for name in (selector, selector.split('.')[-1]):
    for full_name in private.registered():
      if f'.{full_name}'.endswith(f'.{name}'):
        return list(inspect.signature(bindings.configurable(full_name).wrapped).parameters)
  return []


def _attributes(name: str) -> list[str]:
  """The public names of a module, or of a class given as `module.Class`."""
  module, _, attribute = name.rpartition('.')
  owner = sys.modules.get(name) or getattr(sys.modules.get(module), attribute, None)
  return [n for n in dir(owner) if not n.startswith('_')] if owner else []


def _imported_names(file: str | None) -> list[str]:
  if not file:
    return []
  imports = r'^(?:from .+)?import\s+([\w.]+)(?:\s+as\s+(\w+))?'
  lines = re.findall(imports, read(file), re.MULTILINE)
  return [alias or name.split('.')[0] for name, alias in lines]


def _modules_beside(name: str) -> list[str]:
  package = name.rpartition('.')[0]
  paths = getattr(sys.modules.get(package), '__path__', None) if package else None
  prefix = f'{package}.' if package else ''
  return [m.name for m in pkgutil.iter_modules(paths, prefix)]
