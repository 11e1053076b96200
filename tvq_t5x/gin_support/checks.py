"""Refuses mistakes in a parsed gin configuration that gin itself lets pass.

gin refuses a misspelled parameter or class. It accepts a misspelled macro or scope and a value of
the wrong type, and the run then trains on other settings than the ones written down. Once this
module is imported, `gin.finalize` refuses them too, whatever program calls it.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gin

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import annotations, bindings, private
from tvq_t5x.gin_support.bindings import CONSTANT, MACRO, Binding, Config, Function, Key

# Gin files that several programs read may set these, which some of them have no use for. Ignoring
# them does not change what a program computes.
OF_SOME_PROGRAMS = frozenset(
  {
    'ACTIVATION_DTYPE',
    'EVALUATOR_NUM_EXAMPLES',
    'EVALUATOR_USE_MEMORY_CACHE',
    'JSON_WRITE_N_RESULTS',
    'MIXTURE_OR_TASK_MODULE',
    'NUM_MICROBATCHES',
    'NUM_PARTITIONS',
    'NUM_SAMPLES',
    'PARAMETER_PARTITIONING_DIMS',
    'SAMPLE_LENGTH',
    'SAMPLE_PERIOD',
    'SEQUENCE_PARTITIONS',
    'TEST_SPLIT',
    'TRAIN_STEPS_RELATIVE',
    'USE_CACHED_TASKS',
    'USE_HARDWARE_RNG',
  }
)


# What has been bound since the last check, in this order, with the values before.
_history: list[tuple[Key, Any]] = []


@private.note_bindings
def _note(key: Key, before: Any) -> None:
  _history.append((key, before))


@private.first_finalize_hook
def check(config: Config) -> None:
  """Checks a configuration; builds and changes nothing.

  Args:
    config: that gin holds.

  Raises:
    ConfigError: One line for each misspelled macro or scope, unset macro, value of the wrong type,
      and setting that changes nothing.
  """
  found = list(bindings.read(config))
  macros = bindings.macros_of(found)
  history, _history[:] = list(_history), []
  problems = [
    *_unused_macros(found, macros, history),
    *_unset(found, macros),
    *_unused_scopes(found),
    *_shadowed(found, history),
    *_wrong_types(found, macros),
  ]
  if problems:
    raise ConfigError('\n'.join(problems))


def suggest(name: str, known: Iterable[str]) -> str:
  """A '; did you mean ...?' with the names in `known` closest to `name`, or nothing."""
  near = difflib.get_close_matches(name, sorted(set(known) - {name}), n=3)
  return f'; did you mean {" or ".join(near)}?' if near else ''


def _unused_macros(
  found: Sequence[Binding], macros: dict[str, Any], history: Sequence[tuple[Key, Any]]
) -> Iterator[str]:
  used = {bindings.name_of(r) for b in found for r in bindings.references(b.value, MACRO)}
  for name in macros:
    if name in used or name in OF_SOME_PROGRAMS:
      continue
    unused = f'{name} is set but no setting uses %{name}'
    users = {
      key: value
      for key, value in history
      if name in map(bindings.name_of, bindings.references(value, MACRO))
    }
    now = {b.held_by: b for b in found if b.held_by in users}
    if not now:
      yield f'{unused}{suggest(name, used)}'
      continue
    settings = ', '.join(f'{b.key} = {_short(b.value)}' for b in now.values())
    key, first = next(iter(now.items()))
    value = first.value if bindings.macro_of(users[key]) else None
    yield f'{unused}, whose place {settings} has taken; {_instead(name, value)}'


def _instead(macro: str, value: Any) -> str:
  """To set a macro in place of what uses it; `value` that the user wanted, if it is known."""
  text = '...'
  if isinstance(value, str):
    text = f'\\"{value}\\"'
  elif isinstance(value, annotations.SCALARS):
    text = repr(value)
  return f'set {macro} itself: --gin.{macro}={text}'


def _unset(found: Sequence[Binding], macros: dict[str, Any]) -> Iterator[str]:
  users: dict[str, str] = {}
  for binding in found:
    for reference in bindings.references(binding.value, MACRO):
      users.setdefault(bindings.name_of(reference), binding.key)
  unused = macros.keys() - users.keys()
  for name, user in users.items():
    if name not in macros:
      near = suggest(name, unused)
      yield f'%{name} is used by {user} but set nowhere{near}; set it with {_how_to_set(name)}'
  required = [b.key for b in found if _is_required(b.value)]
  if required:
    yield f'required, but not set: {", ".join(required)}; set each with {_how_to_set(required[0])}'


def _is_required(value: Any) -> bool:
  constants = map(bindings.name_of, bindings.references(value, CONSTANT))
  return any(gin.query_parameter(name) is gin.REQUIRED for name in constants)


def _how_to_set(name: str) -> str:
  return f'--gin.{name}=... or with `{name} = ...` in a gin file'


def _unused_scopes(found: Sequence[Binding]) -> Iterator[str]:
  # A binding in scope a/b reaches whatever runs under a reference @a/b/... or @a/b/c/...
  used = {
    '/'.join(r.scopes[: depth + 1])
    for b in found
    for r in bindings.references(b.value)
    for depth in range(len(r.scopes))
  }
  for binding in found:
    if binding.configurable.selector == MACRO or not binding.scope or binding.scope in used:
      continue
    scope, names = binding.scope, ', '.join(sorted(used)) or 'none'
    near = suggest(scope, used)
    yield f'{binding.key}: no reference uses the scope {scope}/{near}; scopes in use: {names}'


def _shadowed(found: Sequence[Binding], history: Sequence[tuple[Key, Any]]) -> Iterator[str]:
  """Settings that reach nothing, as wherever they would an inner scope had its own before."""
  order = {key: i for i, (key, _) in enumerate(history)}
  scopes: dict[str, list[list[str]]] = {}
  for binding in found:
    for reference in bindings.references(binding.value):
      scopes.setdefault(bindings.selector_of(reference), []).append(reference.scopes)
  by_key = {b.held_by: b for b in found}
  for binding in found:
    if binding.held_by not in order or binding.configurable.import_source is None:
      continue  # Python may call what no gin file imports, in any scope.
    own = binding.scope.split('/') if binding.scope else []
    inner = [
      _innermost(binding, own, reached, by_key)
      for reached in scopes.get(binding.configurable.selector, ())
      if reached[: len(own)] == own
    ]
    holding = dict.fromkeys(b.key for b in inner if b)
    last = max((order.get(b.held_by, 0) for b in inner if b), default=0)
    if not inner or not all(inner) or last > order[binding.held_by]:
      continue  # It was a default.
    macros = {bindings.macro_of(b.value) for b in inner if b}
    (macro,) = macros if len(macros) == 1 else (None,)
    yield (
      f'{binding.key} = {_short(binding.value)} changes nothing, as {", ".join(holding)} '
      f'{"hold" if len(holding) > 1 else "holds"}; '
      f'{_instead(macro, binding.value) if macro else "set that"}'
    )


def _innermost(
  binding: Binding,
  own: Sequence[str],
  reached: Sequence[str],
  by_key: dict[Key, Binding],
) -> Binding | None:
  """What holds in the place of a binding of the scope `own` in a scope within it."""
  for depth in range(len(reached), len(own), -1):
    scope = '/'.join(reached[:depth])
    found = by_key.get(((scope, binding.configurable.selector), binding.parameter))
    if found:
      return found
  return None


def _wrong_types(found: Sequence[Binding], macros: dict[str, Any]) -> Iterator[str]:
  for binding in found:
    annotation, default = annotations.declared(binding.configurable.wrapped, binding.parameter)
    value = bindings.resolve(binding.value, macros)
    if not annotations.refuses(annotation, value):
      continue
    # Annotations are often loose: `x: int = None`, or a Mapping that T5X's run files set to None.
    if type(value) is type(default) and annotations.refuses(annotation, default):
      continue
    # T5X says `str` where it accepts None; its programs run as __main__.
    loose = binding.configurable.wrapped.__module__.split('.')[0] in ('t5x', '__main__')
    if value is None and (loose or annotation not in annotations.SCALARS):
      continue
    yield _wrong_type(binding, macros, annotation, value)


def _wrong_type(binding: Binding, macros: dict[str, Any], annotation: Any, value: Any) -> str:
  where = [f'{name} = {_short(v)}' for name, v in _macros_within(binding.value, macros).items()]
  where = f' ({", ".join(where)})' if where else ''
  if isinstance(value, Function):
    got = 'a function or class (add () to call it)'
  else:
    got = f'{type(value).__name__} {_short(value)}'
  near = suggest(value, annotations.choices(annotation)) if isinstance(value, str) else ''
  accepted = annotations.accepted(annotation)
  if annotation is int and isinstance(value, float) and value.is_integer():
    accepted += f' ({int(value)})'
  return f'{binding.key} = {_short(binding.value)}{where}: accepts {accepted}, not {got}{near}'


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f'{text[:77]}...'


def _macros_within(value: Any, macros: dict[str, Any]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  queue = [value]
  while queue:
    for reference in bindings.references(queue.pop(), MACRO):
      name = bindings.name_of(reference)
      if name in macros and name not in found:
        found[name] = macros[name]
        queue.append(macros[name])
  return found
