"""Refuses mistakes in a parsed gin configuration that gin itself lets pass.

gin refuses a misspelled parameter or class. It accepts a misspelled macro or scope and a value of
the wrong type, and the run then trains on other settings than the ones written down.
"""

import collections.abc
import difflib
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gin
from gin import config as gin_config

from tvq_t5x.common.errors import ConfigError

# Gin files that both engines read may set these, which one of them has no use for. Ignoring them
# does not change what a run computes.
OF_ONE_ENGINE = frozenset(
  {
    'EVALUATOR_NUM_EXAMPLES',
    'EVALUATOR_USE_MEMORY_CACHE',
    'JSON_WRITE_N_RESULTS',
    'MIXTURE_OR_TASK_MODULE',
    'NUM_SAMPLES',
    'SAMPLE_LENGTH',
    'SAMPLE_PERIOD',
    'TEST_SPLIT',
    'TRAIN_STEPS_RELATIVE',
    'USE_CACHED_TASKS',
    'USE_HARDWARE_RNG',
  }
)

_MACRO, _CONSTANT = 'gin.macro', 'gin.constant'
_SCALARS = (bool, int, float, str)
_LITERALS = (*_SCALARS, complex, bytes, list, tuple, dict, type(None))
_SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.MutableSequence)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class _Unknown:
  """Stands for a value that exists only once something is built."""


class _Callable:
  """Stands for a reference without `()`: the function or class itself."""


class _Binding(typing.NamedTuple):
  """`key = value`, where `key` is as short as gin allows."""

  key: str
  scope: str
  configurable: gin_config.Configurable
  parameter: str
  value: Any


def check_config() -> None:
  """Checks the configuration that gin holds now; builds and changes nothing.

  Raises:
    ConfigError: One line for each misspelled macro or scope, unset macro, value of the wrong type.
  """
  bindings = list(_bindings())
  macros = {b.scope: b.value for b in bindings if b.configurable.selector == _MACRO}
  problems = [
    *_unused_macros(bindings, macros),
    *_unset(bindings, macros),
    *_unused_scopes(bindings),
    *_wrong_types(bindings, macros),
  ]
  if problems:
    raise ConfigError('\n'.join(problems))


def suggest(name: str, known: Iterable[str]) -> str:
  """A '; did you mean ...?' with the names in `known` closest to `name`, or nothing."""
  near = difflib.get_close_matches(name, sorted(set(known) - {name}), n=3)
  return f'; did you mean {" or ".join(near)}?' if near else ''


def registered() -> dict[str, gin_config.Configurable]:
  """Everything gin can configure, by full name."""
  return dict(gin_config._REGISTRY.items())  # gin has no public view of its registry.


def _bindings() -> Iterator[_Binding]:
  # gin has no public view of its bindings either: query_parameter needs their names.
  for (scope, selector), values in gin_config._CONFIG.items():
    configurable = gin_config._REGISTRY[selector]
    prefix = f'{scope}/' if scope else ''
    for parameter, value in values.items():
      key = f'{prefix}{gin_config._REGISTRY.minimal_selector(selector)}.{parameter}'
      key = scope if selector == _MACRO else key
      yield _Binding(key, scope, configurable, parameter, value)


def _references(value: Any, selector: str | None = None) -> list[gin_config.ConfigurableReference]:
  """The references within `value`: those to `selector`, or all but macros and constants."""
  found = gin_config.iterate_references(value)
  if selector:
    return [r for r in found if _selector(r) == selector]
  return [r for r in found if _selector(r) not in (_MACRO, _CONSTANT)]


def _selector(reference: gin_config.ConfigurableReference) -> str:
  return typing.cast(gin_config.Configurable, reference.configurable).selector


def _name(reference: gin_config.ConfigurableReference) -> str:
  return '/'.join(reference.scopes)


def _unused_macros(bindings: Sequence[_Binding], macros: dict[str, Any]) -> Iterator[str]:
  used = {_name(r) for b in bindings for r in _references(b.value, _MACRO)}
  for name in macros:
    if name not in used and name not in OF_ONE_ENGINE:
      yield f'{name} is set but no setting uses %{name}{suggest(name, used)}'


def _unset(bindings: Sequence[_Binding], macros: dict[str, Any]) -> Iterator[str]:
  users: dict[str, str] = {}
  for binding in bindings:
    for reference in _references(binding.value, _MACRO):
      users.setdefault(_name(reference), binding.key)
  unused = macros.keys() - users.keys()
  for name, user in users.items():
    if name not in macros:
      near = suggest(name, unused)
      yield f'%{name} is used by {user} but set nowhere{near}; set it with {_how_to_set(name)}'
  required = [
    b.key
    for b in bindings
    if any(gin.query_parameter(_name(r)) is gin.REQUIRED for r in _references(b.value, _CONSTANT))
  ]
  if required:
    yield f'required, but not set: {", ".join(required)}; set each with {_how_to_set(required[0])}'


def _how_to_set(name: str) -> str:
  return f'--gin.{name}=... or with `{name} = ...` in a gin file'


def _unused_scopes(bindings: Sequence[_Binding]) -> Iterator[str]:
  # A binding in scope a/b reaches whatever runs under a reference @a/b/... or @a/b/c/...
  used = {
    '/'.join(r.scopes[: depth + 1])
    for b in bindings
    for r in _references(b.value)
    for depth in range(len(r.scopes))
  }
  for binding in bindings:
    if binding.configurable.selector == _MACRO or not binding.scope or binding.scope in used:
      continue
    scope, names = binding.scope, ', '.join(sorted(used)) or 'none'
    near = suggest(scope, used)
    yield f'{binding.key}: no reference uses the scope {scope}/{near}; scopes in use: {names}'


def _wrong_types(bindings: Sequence[_Binding], macros: dict[str, Any]) -> Iterator[str]:
  for binding in bindings:
    annotation, default = _declared(binding.configurable.wrapped, binding.parameter)
    value = _resolve(binding.value, macros)
    if not _refuses(annotation, value):
      continue
    # Annotations are often loose: `x: int = None`, or a Mapping that T5X's run files set to None.
    if type(value) is type(default) and _refuses(annotation, default):
      continue
    # T5X says `str` where it accepts None; its programs run as __main__.
    loose = binding.configurable.wrapped.__module__.split('.')[0] in ('t5x', '__main__')
    if value is None and (loose or annotation not in _SCALARS):
      continue
    where = [f'{name} = {_short(v)}' for name, v in _macros_within(binding.value, macros).items()]
    where = f' ({", ".join(where)})' if where else ''
    if isinstance(value, _Callable):
      got = 'a function or class (add () to call it)'
    else:
      got = f'{type(value).__name__} {_short(value)}'
    near = suggest(value, _choices(annotation)) if isinstance(value, str) else ''
    accepted = _accepted(annotation)
    if annotation is int and isinstance(value, float) and value.is_integer():
      accepted += f' ({int(value)})'
    key = binding.key
    yield f'{key} = {_short(binding.value)}{where}: accepts {accepted}, not {got}{near}'


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'


def _macros_within(value: Any, macros: dict[str, Any]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  queue = [value]
  while queue:
    for reference in _references(queue.pop(), _MACRO):
      name = _name(reference)
      if name in macros and name not in found:
        found[name] = macros[name]
        queue.append(macros[name])
  return found


def _resolve(value: Any, macros: dict[str, Any], within: tuple[str, ...] = ()) -> Any:
  """`value` with its macros and constants filled in."""
  if isinstance(value, gin_config.ConfigurableReference):
    name = _name(value)
    if _selector(value) == _CONSTANT:
      return gin.query_parameter(name)
    if _selector(value) == _MACRO:
      if name in macros and name not in within:
        return _resolve(macros[name], macros, (*within, name))
      return _Unknown()
    return _Unknown() if value.evaluate else _Callable()
  if isinstance(value, list | tuple):
    return type(value)(_resolve(v, macros, within) for v in value)
  if isinstance(value, dict):
    return {k: _resolve(v, macros, within) for k, v in value.items()}
  return value


def _declared(target: Any, parameter: str) -> tuple[Any, Any]:
  """The annotation (`Any` if there is none to be had) and the default of a parameter."""
  try:
    found = inspect.signature(target).parameters.get(parameter)
  except (TypeError, ValueError):  # Some built-in functions have no signature.
    found = None
  if found is None:  # It goes into **kwargs.
    return Any, inspect.Parameter.empty
  annotation = Any if found.annotation is inspect.Parameter.empty else found.annotation
  if isinstance(annotation, str):
    annotation = _evaluate(annotation, _module(target, parameter))
  return _plain(annotation), found.default


def _module(target: Any, parameter: str) -> dict[str, Any]:
  """The globals in which a string annotation was written: a field's may be a parent class's."""
  if not inspect.isclass(target):
    return getattr(inspect.unwrap(target), '__globals__', {})
  constructors = [b for b in target.__mro__ if {'__init__', '__new__'} & vars(b).keys()]
  fields = [b for b in target.__mro__ if parameter in inspect.get_annotations(b)]
  owner = (fields or constructors)[0]
  return vars(sys.modules[owner.__module__])


def _evaluate(annotation: str, namespace: dict[str, Any]) -> Any:
  try:
    return eval(annotation, dict(namespace))  # What typing.get_type_hints does, for one name.
  except Exception:  # Such as a name imported only under TYPE_CHECKING.
    return Any


def _plain(annotation: Any) -> Any:
  """What a NewType or an Annotated stands for."""
  if isinstance(annotation, typing.NewType):
    return _plain(annotation.__supertype__)
  if typing.get_origin(annotation) is typing.Annotated:
    return _plain(typing.get_args(annotation)[0])
  return annotation


def _refuses(annotation: Any, value: Any) -> bool:
  """Whether `value` is surely no `annotation`: what is not simple passes."""
  annotation = _plain(annotation)
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return all(_refuses(option, value) for option in args)
  if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
    return not _is_member(annotation, value) and isinstance(value, _LITERALS)
  if isinstance(value, _Callable):
    return annotation in (bool, int, float, None, type(None))
  if not isinstance(value, _LITERALS):
    return False
  if origin is typing.Literal:
    return not any(type(value) is type(option) and value == option for option in args)
  if annotation in (None, type(None)):
    return value is not None
  if annotation in (bool, str):
    return not isinstance(value, annotation)
  if annotation in (int, float):
    numbers = int if annotation is int else (int, float)
    return isinstance(value, bool) or not isinstance(value, numbers)
  return _container_refuses(origin or annotation, args, value)


def _container_refuses(container: Any, args: Sequence[Any], value: Any) -> bool:
  if container in _MAPPINGS:
    if not isinstance(value, dict):
      return True
    pairs = [pair for item in value.items() for pair in zip(args, item, strict=False)]
    return any(_refuses(option, part) for option, part in pairs)
  if container in _SEQUENCES:
    # gin files write lists and tuples alike; text is a sequence, but hardly ever the one meant.
    if not isinstance(value, list | tuple):
      return True
    if container is tuple and args and args[-1] is not Ellipsis:
      args = () if args == ((),) else args
      return len(value) != len(args) or any(map(_refuses, args, value))
    return bool(args) and any(_refuses(args[0], part) for part in value)
  return False


def _is_member(choices: type[enum.Enum], value: Any) -> bool:
  # A str or int enum is interchangeable with its values.
  return isinstance(value, choices) or any(value == member for member in choices)


def _choices(annotation: Any) -> list[str]:
  if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
    return [str(m.value) if isinstance(m, str) else m.name for m in annotation]
  args = typing.get_args(annotation)
  if typing.get_origin(annotation) is typing.Literal:
    return [a for a in args if isinstance(a, str)]
  return [choice for option in args for choice in _choices(option)]


def _accepted(annotation: Any) -> str:
  if annotation is bool:
    return 'bool (True or False)'
  if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
    return f'{annotation.__name__} ({", ".join(_choices(annotation))})'
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return ' or '.join(_accepted(option) for option in typing.get_args(annotation))
  text = 'None' if annotation is type(None) else inspect.formatannotation(annotation)
  return re.sub(r'\b(typing|collections\.abc)\.', '', text)
