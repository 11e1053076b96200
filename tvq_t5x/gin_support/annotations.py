"""What the annotation of a parameter accepts, as far as it can be told from a gin file."""

import collections.abc
import enum
import inspect
import re
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any

from tvq_t5x.gin_support.bindings import Function

SCALARS = (bool, int, float, str)
_LITERALS = (*SCALARS, complex, bytes, list, tuple, dict, type(None))
_SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.MutableSequence)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def declared(target: Any, parameter: str) -> tuple[Any, Any]:
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


def refuses(annotation: Any, value: Any) -> bool:
  """Whether `value` is surely no `annotation`: what is not simple passes."""
  annotation = _plain(annotation)
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return all(refuses(option, value) for option in args)
  if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
    return not _is_member(annotation, value) and isinstance(value, _LITERALS)
  if isinstance(value, Function):
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
    return any(refuses(option, part) for option, part in pairs)
  if container in _SEQUENCES:
    # gin files write lists and tuples alike; text is a sequence, but hardly ever the one meant.
    if not isinstance(value, list | tuple):
      return True
    if container is tuple and args and args[-1] is not Ellipsis:
      args = () if args == ((),) else args
      return len(value) != len(args) or any(map(refuses, args, value))
    return bool(args) and any(refuses(args[0], part) for part in value)
  return False


def _is_member(choices: type[enum.Enum], value: Any) -> bool:
  # A str or int enum is interchangeable with its values.
  return isinstance(value, choices) or any(value == member for member in choices)


def choices(annotation: Any) -> list[str]:
  """The texts that an enum or a Literal consists of."""
  if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
    return [str(m.value) if isinstance(m, str) else m.name for m in annotation]
  args = typing.get_args(annotation)
  if typing.get_origin(annotation) is typing.Literal:
    return [a for a in args if isinstance(a, str)]
  return [choice for option in args for choice in choices(option)]


def accepted(annotation: Any) -> str:
  """What to write, in words."""
  if annotation is bool:
    return 'bool (True or False)'
  if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
    return f'{annotation.__name__} ({", ".join(choices(annotation))})'
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    return ' or '.join(accepted(option) for option in typing.get_args(annotation))
  text = 'None' if annotation is type(None) else inspect.formatannotation(annotation)
  return re.sub(r'\b(typing|collections\.abc)\.', '', text)
