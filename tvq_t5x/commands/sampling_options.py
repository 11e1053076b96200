"""The options of `python -m tvq_t5x.sample`."""

import dataclasses
import math
import os
from collections.abc import Sequence

from tvq_t5x.commands import command_line
from tvq_t5x.common.errors import A_SEED, ConfigError, is_seed

# What says how, where or how many tokens are chosen.
_OF_SAMPLES = ('num_samples', 'max_tokens', 'temperature', 'top_p', 'top_k', 'seed', 'png')


@dataclasses.dataclass(frozen=True)
class Options:
  """The command's own flags, which `--help` explains; None is what is not given."""

  prompt: Sequence[str] = ()
  prompt_file: str | None = None
  num_samples: int | None = None
  max_tokens: int | None = None
  temperature: float | None = None
  top_p: float | None = None
  top_k: int | None = None
  seed: int | None = None
  json: str | None = None
  png: str | None = None
  state_in: str | None = None
  state_out: str | None = None
  score: bool = False
  per_token: bool = False

  def check(self) -> None:
    """Refuses what no checkpoint could change.

    Raises:
      ConfigError: naming the flag.
    """
    for name, value in (('num_samples', self.num_samples), ('max_tokens', self.max_tokens)):
      if value is not None and value < 1:
        raise ConfigError(f'--{name}={value}: give a whole number of at least 1.')
    if self.temperature is not None and not 0 <= self.temperature < math.inf:
      raise ConfigError(
        f'--temperature={self.temperature}: give 0, the likeliest token, or a larger finite number.'
      )
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ConfigError(f'--top_p={self.top_p}: give a share of more than 0 and at most 1.')
    if self.top_k is not None and self.top_k < 0:
      raise ConfigError(f'--top_k={self.top_k}: give 0, all tokens, or more.')
    if self.seed is not None and not is_seed(self.seed):
      raise ConfigError(f'--seed={self.seed}: give {A_SEED}.')
    if self.prompt and self.prompt_file:
      raise ConfigError('--prompt and --prompt_file: give one of them.')
    for name, path in (('prompt_file', self.prompt_file), ('state_in', self.state_in)):
      if (name, path) == ('prompt_file', '-'):
        continue
      if path is not None and os.path.isdir(path):
        raise ConfigError(f'--{name}={path} is a folder: give a file.')
      if path is not None and not os.path.exists(path):
        raise ConfigError(f'--{name}={path}: there is no such file.')
    if self.score and not self.prompt and not self.prompt_file:
      raise ConfigError('--score: say what to score with --prompt or --prompt_file.')
    if self.per_token and not self.score:
      raise ConfigError('--per_token is a table of --score: give both.')
    for name in _OF_SAMPLES if self.score else ():
      if getattr(self, name) is not None:
        raise ConfigError(f'--{name}: --score continues no text; leave it out.')
    for name in ('json', 'png', 'state_out'):
      command_line.check_output(f'--{name}', getattr(self, name))

  @property
  def samples(self) -> int:
    """Continuations of each prompt."""
    return 1 if self.num_samples is None else self.num_samples
