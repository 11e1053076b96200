"""The exceptions whose messages are all that a user needs to see."""


class ConfigError(ValueError):
  """A setting, file or flag that is refused before anything is compiled.

  The message names the gin binding, file or flag to change and what would be accepted.
  """


class CheckpointError(RuntimeError):
  """A checkpoint that can't be written or read; the message says what is left."""


class TrainingDiverged(RuntimeError):
  """A loss, gradient or parameter that is no finite number."""
