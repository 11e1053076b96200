"""What is taken from gin's insides, as gin has no public name for it.

`setup.py` holds gin-config to the versions that are known to have these.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from gin import config as gin_config
from gin import resource_reader

from tvq_t5x.gin_support.bindings import Config, Key


def first_finalize_hook(hook: Callable[[Config], None]) -> Callable[[Config], None]:
  """Makes `gin.finalize` call `hook` before gin's own hooks, which say less of what is unset."""
  gin_config.register_finalize_hook(hook)
  hooks = gin_config._FINALIZE_HOOKS
  hooks.insert(0, hooks.pop())
  return hook


def note_bindings(note: Callable[[Key, Any], None]) -> Callable[[Key, Any], None]:
  """Makes gin's parser call `note` whenever it binds, with what it binds and its value before.

  Args:
    note: is given None where there was no value.
  """
  bind = gin_config.bind_parameter

  def noted(key: str | tuple[str, str, str], value: Any) -> None:
    parsed = gin_config.ParsedBindingKey.parse(key)
    before = gin_config._CONFIG.get(parsed.config_key, {}).get(parsed.arg_name)
    bind(key, value)
    note((parsed.config_key, parsed.arg_name), before)

  gin_config.bind_parameter = noted
  return note


def registered() -> list[str]:
  """The full names of all that gin can configure."""
  return [name for name, _ in gin_config._REGISTRY.items()]


@contextlib.contextmanager
def files_read_from(
  folders: Sequence[str], read: Callable[[str], IO[str]], in_package: Callable[[str], str]
) -> Iterator[None]:
  """Makes gin look for files in `folders` only, and then in installed packages.

  gin's public function can only append to a list that starts with the working directory. Its
  reader of files in Python packages logs an error for each folder without the file, and raises
  TypeError, ending the search, at a folder that could be a package but has no __init__.py.

  Args:
    folders: in the order of the search.
    read: opens a file.
    in_package: the path of the file `package/folder/name.gin` of an installed package, or ''.
  """
  saved = gin_config._LOCATION_PREFIXES, gin_config._FILE_READERS
  ours: dict[Any, Any] = {open: read, resource_reader.system_path_reader: None}
  readers = [(ours.get(reader, reader), exists) for reader, exists in saved[1]]
  readers.append((lambda path: read(in_package(path)), lambda path: bool(in_package(path))))
  gin_config._LOCATION_PREFIXES = list(folders)
  gin_config._FILE_READERS = [reader for reader in readers if reader[0]]
  try:
    yield
  finally:
    gin_config._LOCATION_PREFIXES, gin_config._FILE_READERS = saved
