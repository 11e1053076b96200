"""The settings that something is built with, as the gin configuration has them."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gin import config as gin_config

from tvq_t5x.gin_support import bindings, origins
from tvq_t5x.gin_support.annotations import SCALARS
from tvq_t5x.gin_support.bindings import CONSTANT, MACRO


def of_parameter(function: Callable[..., Any], parameter: str) -> dict[str, Any]:
  """The settings of what a parameter gets, and of all that this is built of.

  Args:
    function: or class, that the finished configuration binds.
    parameter: of it.

  Returns:
    By name, such as 'adamw.clip_norm', what JSON has, defaults included: numbers, text and None;
    '@NAME()' for what is built, and other values as text. Empty if nothing is bound.
  """
  found: dict[str, Any] = {}
  for binding in origins.finished():
    if binding.configurable.wrapped is function and binding.parameter == parameter:
      found.update(_described(binding.key, binding.value, ()))
  return found


def _described(name: str, value: Any, within: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
  value = _filled(value, bindings.macros_of(origins.finished()))
  if value is None or isinstance(value, SCALARS):
    yield name, value
  else:
    yield name, str(value)
  for reference in bindings.references(value):
    owner = bindings.selector_of(reference)
    if owner not in within:
      for parameter, bound in _parameters(reference).items():
        yield from _described(parameter, bound, (*within, owner))


def _filled(value: Any, macros: Mapping[str, Any]) -> Any:
  """`value` with its macros and constants filled in, and references as they are."""
  if isinstance(value, gin_config.ConfigurableReference):
    is_name = bindings.selector_of(value) in (MACRO, CONSTANT)
    if is_name and bindings.name_of(value) in macros:
      return _filled(macros[bindings.name_of(value)], macros)
    return bindings.resolve(value, macros) if is_name else value
  if isinstance(value, list | tuple):
    return type(value)(_filled(v, macros) for v in value)
  if isinstance(value, dict):
    return {k: _filled(v, macros) for k, v in value.items()}
  return value


def _parameters(reference: gin_config.ConfigurableReference) -> dict[str, Any]:
  """The parameters of what a reference stands for, by name: bound ones, and plain defaults."""
  scopes = ['/'.join(reference.scopes[:depth]) for depth in range(len(reference.scopes) + 1)]
  selector = bindings.selector_of(reference)
  configurable = bindings.configurable(selector)
  name = '/'.join([*reference.scopes, configurable.name])
  found = {
    f'{name}.{p.name}': p.default
    for p in inspect.signature(configurable.wrapped).parameters.values()
    if p.default is None or isinstance(p.default, SCALARS)
  }
  for scope in scopes:  # The innermost holds.
    for binding in origins.finished():
      if (binding.configurable.selector, binding.scope) == (selector, scope):
        found[f'{name}.{binding.parameter}'] = binding.value
  return found
