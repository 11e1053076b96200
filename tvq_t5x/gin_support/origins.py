"""Says in messages where the settings that they name were set.

A message names a setting as its code knows it, `DatasetConfig.batch_size = 0`. A gin file may have
set it by a macro, in a scope, or under the name that the other engine has for it.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence

import gin
from gin import config as gin_config

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import bindings
from tvq_t5x.gin_support.bindings import MACRO, Binding, Config

_SETTING = re.compile(r'(?<![\w./-])(?P<owner>[A-Za-z_][\w.]*)\.(?P<parameter>\w+)')

_finished: list[Binding] = []  # Of the last configuration that was finished.


@gin_config.register_finalize_hook
def _remember(config: Config) -> None:
  _finished[:] = bindings.read(config)


def finished() -> Sequence[Binding]:
  """What the configuration binds that was finished last."""
  return _finished


def with_origins(message: str) -> str:
  """A message that says of the settings it names what sets them, as ' (macro BATCH_SIZE)'.

  A setting whose value in the message is none that gin has for it is left as it is, and so is the
  whole message unless gin holds a finished configuration.
  """
  if not gin.config_is_locked():
    return message
  parts, start, named = [], 0, set()
  for found in _SETTING.finditer(message):
    if found.start() < start or found[0] in named:
      continue
    named.add(found[0])
    end, origins = _look_up(message, found)
    if origins:
      parts += [message[start:end], f' ({", ".join(origins)})']
      start = end
  return ''.join([*parts, message[start:]])


@contextlib.contextmanager
def added_to_errors() -> Iterator[None]:
  """Gives a ConfigError that passes a message `with_origins`."""
  try:
    yield
  except ConfigError as e:
    e.args = (with_origins(str(e)),)
    raise


def _look_up(message: str, found: re.Match[str]) -> tuple[int, list[str]]:
  """Where in the message a setting ends, its value included, and what sets it."""
  bound = [b for b in _finished if b.parameter == found['parameter']]
  own = [b for b in bound if b.configurable.selector.endswith(found['owner'])]
  if not message.startswith(' = ', found.end()):
    return found.end(), _distinct(macro for b in own for macro in _macros(b))
  end, origins = found.end(), []
  macros = bindings.macros_of(_finished)
  for binding in own or bound:
    text = re.escape(f' = {bindings.resolve(binding.value, macros)!r}')
    if value := re.compile(rf'{text}(?!\w|\.\w)').match(message, found.end()):
      end = value.end()
      plain = binding in own and not binding.scope  # The message has its name already.
      origins += _macros(binding) or ([] if plain else [binding.key])
  return end, _distinct(origins)


def _macros(binding: Binding) -> list[str]:
  return [f'macro {bindings.name_of(r)}' for r in bindings.references(binding.value, MACRO)]


def _distinct(origins: Iterator[str] | list[str]) -> list[str]:
  return list(dict.fromkeys(origins))
