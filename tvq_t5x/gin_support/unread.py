"""Settings of a command line that a command has no use for."""

import re
from collections.abc import Sequence

import gin

# Of gin's own account of what was built: a setting that was read, perhaps in a scope.
_READ = re.compile(r'^(?:[\w/]+/)?([\w.]+) =', re.MULTILINE)


def unread(gin_bindings: Sequence[str]) -> list[str]:
  """Those of `gin_bindings` that nothing has read that was built of the configuration.

  Fields of `train` are not among them: they are read one by one, which gin takes no note of.

  Args:
    gin_bindings: `NAME = VALUE`, as the configuration was given them.
  """
  read = {_end(name) for name in _READ.findall(gin.operative_config_str())}
  names = {binding: _end(binding.partition('=')[0].strip()) for binding in gin_bindings}
  return [b for b, name in names.items() if name not in read and not name.startswith('train.')]


def _end(name: str) -> str:
  """A macro's name, or a parameter's with the last part of its owner's: modules may be left out."""
  return '.'.join(name.rpartition('/')[2].split('.')[-2:])
