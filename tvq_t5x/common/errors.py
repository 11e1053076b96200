"""The exceptions whose messages are all that a user needs to see."""

from typing import Any, TypeGuard


class ConfigError(ValueError):
  """A setting, file or flag that is refused before anything is compiled.

  The message names the gin binding, file or flag to change and what would be accepted.
  """


class CheckpointError(RuntimeError):
  """A checkpoint that can't be written or read; the message says what is left."""


class TrainingDiverged(RuntimeError):
  """A loss, gradient or parameter that is no finite number."""


def is_count(value: Any) -> TypeGuard[int]:
  """Whether a setting is a whole number of at least 1."""
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def reason(error: BaseException) -> str:
  """The innermost message, on one short line."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip().splitlines() or [type(error).__name__]
  text = lines[0] if len(lines[0]) <= 200 else f'{lines[0][:197]}...'
  return text if text.endswith('.') else f'{text}.'
