"""Reads a gin file that lies beside a checkpoint, which may be someone else's, without obeying it.

gin imports any module that a file names, and calls any function of it. A file that nobody named on
the command line may name only what a run of this package needs.
"""

import tokenize
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gin import config_parser

from tvq_t5x.common.errors import ConfigError, reason

# What a run's configuration gives settings, by module.
_ALLOWED: dict[str, frozenset[str]] = {
  module: frozenset(names)
  for module, names in {
    'tvq_t5x.data.classification': ('task_format', 'vocab_size'),
    'tvq_t5x.data.datasets': ('DatasetConfig', 'vocab_size', 'vocabulary'),
    'tvq_t5x.data.token_cache': ('directory',),
    'tvq_t5x.data.vocabularies': ('sentencepiece_model', 'vocab_size'),
    'tvq_t5x.network.config': ('TransformerConfig',),
    'tvq_t5x.network.longvq.longvq': ('LongVQ',),
    'tvq_t5x.network.transformer': ('Transformer',),
    'tvq_t5x.standalone.runner': ('train',),
    'tvq_t5x.standalone.samples': ('SampleConfig',),
    'tvq_t5x.training.classifier': ('ClassifierModel',),
    'tvq_t5x.training.models': ('TransformerVQModel', 'TransformerVQModel.predict_batch_with_aux'),
    'tvq_t5x.training.optimizers': ('adafactor', 'adamw', 'lion', 'warmup_cosine', 'warmup_linear'),
    'tvq_t5x.training.partitioning': ('Partitioner', 'standard_logical_axis_rules'),
  }.items()
}
# Of these, what has settings and is called by nobody but this package: a run writes files.
_NEVER_CALLED = frozenset({'train', 'TransformerVQModel.predict_batch_with_aux'})
_TASKS = 'tvq_t5x.tasks.'
_OF_TASKS = frozenset({'corpus', 'data', 'folder'})
# The parameter of these modules' functions that names a module, which is then imported.
_IMPORTS = frozenset({'tvq_t5x.data.classification', 'tvq_t5x.data.datasets'})
_MODULE_PARAMETER = 'module'


class _Reference(NamedTuple):
  name: str  # Without scopes.


class _Macro(NamedTuple):
  name: str


class _Delegate(config_parser.ParserDelegate):
  """Notes references in place of resolving them."""

  def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Reference:
    del evaluate
    return _Reference(scoped_configurable_name.rpartition('/')[2])

  def macro(self, macro_name: str) -> _Macro:
    return _Macro(macro_name)


def check(text: str, source: str, modules: Sequence[str] = ()) -> None:
  """Refuses a gin file that names more than a run of this package needs; runs nothing of it.

  Args:
    text: of the file, with the imports of today.
    source: its path, for the message.
    modules: of the user, which the file may import and call, too.

  Raises:
    ConfigError: naming what is refused; also for what is no gin.
  """
  try:
    statements = list(config_parser.ConfigParser(text, _Delegate()))
  except (SyntaxError, ValueError, tokenize.TokenError) as e:
    raise ConfigError(f'{source} is no configuration of a run: {reason(e)}') from e
  imported: dict[str, str] = {}
  macros: dict[str, Any] = {}
  bindings: list[config_parser.BindingStatement] = []
  for statement in statements:
    if isinstance(statement, config_parser.ImportStatement):
      _check_import(statement, source, modules)
      # `import a.b` makes `a` known, `from a import b` makes `b`.
      dotted = statement.is_from or statement.alias
      name = statement.bound_name()
      module = statement.module if dotted else name
      if imported.setdefault(name, module) != module:
        raise _refused(source, statement.format(), '')
    elif isinstance(statement, config_parser.IncludeStatement):
      raise _refused(source, f'include {statement.filename!r}', '')
    elif isinstance(statement, config_parser.BlockDeclaration):
      _check_name(statement.selector, imported, source, modules)
    elif not statement.arg_name:
      scope = f'{statement.scope}/' if statement.scope else ''
      macros[scope + statement.selector] = statement.value
    else:
      _check_name(statement.selector, imported, source, modules)
      bindings.append(statement)
  values = [*macros.values(), *(binding.value for binding in bindings)]
  for reference in _references(values):
    _check_name(reference.name, imported, source, modules, called=True)
  for binding in bindings:
    owner = imported.get(binding.selector.partition('.')[0])
    if owner in _IMPORTS and binding.arg_name == _MODULE_PARAMETER:
      _check_module(_resolve(binding.value, macros), source, modules)


def _check_import(
  statement: config_parser.ImportStatement, source: str, modules: Sequence[str]
) -> None:
  module = statement.module
  known = module in _ALLOWED or _is_task(module) or module.startswith('__gin__.')
  if not known and not _is_in(module, modules):
    raise _refused(source, statement.format(), module)


def _check_name(
  name: str,
  imported: dict[str, str],
  source: str,
  modules: Sequence[str],
  called: bool = False,
) -> None:
  first, _, rest = name.partition('.')
  if first == 'gin':  # A macro in another form, whose value `_resolve` would not see.
    raise _refused(source, name, '')
  module = imported.get(first, first)
  allowed = _OF_TASKS if _is_task(module) else _ALLOWED.get(module, frozenset())
  if called:
    allowed = allowed - _NEVER_CALLED
  if rest not in allowed and not _is_in(module, modules):
    raise _refused(source, f'@{name}', module)


def _check_module(value: Any, source: str, modules: Sequence[str]) -> None:
  if value is None or (isinstance(value, str) and (_is_task(value) or _is_in(value, modules))):
    return
  raise _refused(source, f'module = {value!r}', value if isinstance(value, str) else '')


def _is_task(module: str) -> bool:
  return module.startswith(_TASKS) and module.removeprefix(_TASKS).isidentifier()


def _is_in(module: str, modules: Sequence[str]) -> bool:
  return any(module == name or module.startswith(f'{name}.') for name in modules)


def _resolve(value: Any, macros: dict[str, Any]) -> Any:
  seen = set()
  while isinstance(value, _Macro) and value.name not in seen:
    seen.add(value.name)
    value = macros.get(value.name, value)
  return value


def _references(value: Any) -> Iterator[_Reference]:
  if isinstance(value, _Reference):
    yield value
  elif isinstance(value, dict):
    yield from _references([*value.keys(), *value.values()])
  elif isinstance(value, list | tuple) and not isinstance(value, _Macro):
    for item in value:
      yield from _references(item)


def _refused(source: str, what: str, module: str) -> ConfigError:
  allow = f' If it is yours, allow it with --module={module}.' if module else ''
  return ConfigError(
    f'{source}: `{what}` is refused: a configuration that is found beside a checkpoint may name '
    f"only this package's own model, optimizers and tasks.{allow} Or give a gin file that you "
    'trust with --gin_file.'
  )
