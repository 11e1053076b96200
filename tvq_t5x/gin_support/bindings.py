"""What a gin configuration binds."""

import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gin
from gin import config as gin_config

MACRO, CONSTANT = 'gin.macro', 'gin.constant'

# What gin hands to a finalize hook: by scope and full name of what is configured, values by name.
Config = Mapping[tuple[str, str], Mapping[str, Any]]


# What gin holds a value by: scope and full name of what is configured, and the parameter.
Key = tuple[tuple[str, str], str]


class Unknown:
  """Stands for a value that exists only once something is built."""


class Function:
  """Stands for a reference without `()`: the function or class itself."""


class Binding(typing.NamedTuple):
  """`key = value`, where `key` is as short as gin allows."""

  key: str
  scope: str
  configurable: gin_config.Configurable
  parameter: str
  value: Any

  @property
  def held_by(self) -> Key:
    """What gin holds the value by."""
    return (self.scope, self.configurable.selector), self.parameter


def read(config: Config) -> Iterator[Binding]:
  """The bindings of a configuration; that of a macro has the macro's name as key and scope."""
  for (scope, selector), values in config.items():
    prefix = f'{scope}/' if scope else ''
    for parameter, value in values.items():
      key = scope if selector == MACRO else f'{prefix}{_shortest(selector)}.{parameter}'
      yield Binding(key, scope, configurable(selector), parameter, value)


def macros_of(bindings: Iterable[Binding]) -> dict[str, Any]:
  """The values of macros by their names."""
  return {b.scope: b.value for b in bindings if b.configurable.selector == MACRO}


def configurable(selector: str) -> gin_config.Configurable:
  """What gin configures under a name, which may be shortened from the left.

  Raises:
    KeyError: if several end like that.
    ValueError: if there is none.
  """
  found = gin_config.ConfigurableReference(selector, evaluate=False).configurable
  return typing.cast(gin_config.Configurable, found)


def _shortest(selector: str) -> str:
  """As much of a full name's end as tells it from all others."""
  parts = selector.split('.')
  for i in range(len(parts) - 1, 0, -1):
    short = '.'.join(parts[i:])
    try:
      if configurable(short).selector == selector:
        return short
    except KeyError:  # Several end like that.
      continue
  return selector


def references(value: Any, selector: str | None = None) -> list[gin_config.ConfigurableReference]:
  """The references within `value`: those to `selector`, or all but macros and constants."""
  found = gin_config.iterate_references(value)
  if selector:
    return [r for r in found if selector_of(r) == selector]
  return [r for r in found if selector_of(r) not in (MACRO, CONSTANT)]


def macro_of(value: Any) -> str | None:
  """The name of the macro that `value` is, if it is one."""
  if isinstance(value, gin_config.ConfigurableReference) and selector_of(value) == MACRO:
    return name_of(value)
  return None


def selector_of(reference: gin_config.ConfigurableReference) -> str:
  """The full name of what a reference stands for."""
  return typing.cast(gin_config.Configurable, reference.configurable).selector


def name_of(reference: gin_config.ConfigurableReference) -> str:
  """The name of a macro or constant."""
  return '/'.join(reference.scopes)


def resolve(value: Any, macros: Mapping[str, Any], within: tuple[str, ...] = ()) -> Any:
  """`value` with its macros and constants filled in; nothing is built."""
  if isinstance(value, gin_config.ConfigurableReference):
    name = name_of(value)
    if selector_of(value) == CONSTANT:
      return gin.query_parameter(name)
    if selector_of(value) == MACRO:
      if name in macros and name not in within:
        return resolve(macros[name], macros, (*within, name))
      return Unknown()
    return Unknown() if value.evaluate else Function()
  if isinstance(value, list | tuple):
    return type(value)(resolve(v, macros, within) for v in value)
  if isinstance(value, dict):
    return {k: resolve(v, macros, within) for k, v in value.items()}
  return value
