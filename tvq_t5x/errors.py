"""The exception of bad configuration."""


class ConfigError(ValueError):
  """A setting, file or flag that is refused before anything is compiled.

  The message names the gin binding, file or flag to change and what would be accepted.
  """
