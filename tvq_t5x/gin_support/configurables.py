"""What modules that know no gin have of it: functions that it configures, macros to ask for."""

from collections.abc import Callable
from typing import TypeVar, cast

import gin

_Function = TypeVar('_Function', bound=Callable)


def configurable(function: _Function) -> _Function:
  """Lets gin set the parameters of a function that Python calls, under the name of its module.

  Unlike `gin.configurable`, it may be applied while gin's configuration is locked, as it is when a
  task's module is imported late, and again when the module is reloaded.
  """
  with gin.unlock_config():
    try:
      return cast(_Function, gin.configurable(function))
    except ValueError:  # gin has another function of this name, the one before the reload.
      gin.enter_interactive_mode()
      try:
        return cast(_Function, gin.configurable(function))
      finally:
        gin.exit_interactive_mode()


def has_macro(name: str) -> bool:
  """Whether the configuration gives a macro a value, None included."""
  try:
    gin.query_parameter(f'{name}/gin.macro.value')
  except ValueError:  # A command without gin files, or none of them has the macro.
    return False
  return True
