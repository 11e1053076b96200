"""The exceptions whose messages are all that a user needs to see."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeGuard


class ConfigError(ValueError):
  """A setting, file or flag that is refused before anything is compiled.

  The message names the setting, file or flag to change and what would be accepted. A setting has
  the name that it has in Python, `DatasetConfig.batch_size`; which gin macro sets it is found where
  the message is shown.

  Attributes:
    setting: its name; None where the message was given as a whole.
    value: of the setting.
    accepted: what to give in its place, in words.
    problem: what is wrong with it, in words.
  """

  def __init__(
    self,
    setting: str,
    value: Any = None,
    accepted: str | None = None,
    problem: str = 'is not accepted',
  ):
    """Makes the message `SETTING = VALUE PROBLEM: give ACCEPTED.`

    Args:
      setting: its name; without `accepted`, the whole message.
      value: that was given.
      accepted: what to give in its place, in words.
      problem: what is wrong with the value, in words.
    """
    self.setting = None if accepted is None else setting
    self.value, self.accepted, self.problem = value, accepted, problem
    whole = f'{setting} = {value!r} {problem}: give {accepted}.'
    super().__init__(setting if accepted is None else whole)


@contextlib.contextmanager
def renamed(setting: str, given: str) -> Iterator[None]:
  """Gives a ConfigError about a setting the name of what it was set by.

  Args:
    setting: its name.
    given: the other setting, or the flag.
  """
  try:
    yield
  except ConfigError as e:
    if e.setting != setting:
      raise
    raise ConfigError(given, e.value, e.accepted, e.problem) from e


class CheckpointError(RuntimeError):
  """A checkpoint that can't be written or read; the message says what is left."""


class TrainingDiverged(RuntimeError):
  """A loss, gradient or parameter that is no finite number."""


class Stopped(RuntimeError):
  """A signal ended a run before its end, with a checkpoint from which it can go on.

  Attributes:
    number: of the signal.
  """

  def __init__(self, number: int):
    super().__init__(f'stopped by signal {number}')
    self.number = number


def is_count(value: Any) -> TypeGuard[int]:
  """Whether a setting is a whole number of at least 1."""
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


# For messages: what `is_seed` accepts.
A_SEED = f'a whole number from {-(2**63)} to {2**63 - 1}'


def is_seed(value: Any) -> TypeGuard[int]:
  """Whether a setting is a whole number of 64 bits."""
  return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def reason(error: BaseException) -> str:
  """The innermost message, on one short line: of a long one, both ends, the last is the cause."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip().splitlines() or [type(error).__name__]
  text = lines[0] if len(lines[0]) <= 200 else f'{lines[0][:98]}...{lines[0][-99:]}'
  return text if text.endswith('.') else f'{text}.'
