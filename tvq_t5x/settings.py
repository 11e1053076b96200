"""Where data lies: given in gin, or by an environment variable of the same name."""

import os


def path(name: str, value: str | None) -> str | None:
  """A path that a gin macro sets, or else the environment variable with the macro's name.

  Args:
    name: of both.
    value: from gin; None or '' means that gin does not set it.

  Returns:
    The path with `~` filled in, or None if it is set in neither way.
  """
  found = value or os.environ.get(name)
  return os.path.expanduser(found) if found else None


def how_to_set(name: str) -> str:
  """Both ways to set `name`, for messages."""
  return f'--gin.{name}=\\"...\\" or the environment variable {name}'
