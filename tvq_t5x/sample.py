"""Continues prompts with a checkpoint, in time that does not grow with the length; or scores them.

Examples:

  python -m tvq_t5x.sample --checkpoint=runs/kjv --prompt="In the beginning" --max_tokens=500
  python -m tvq_t5x.sample --checkpoint=runs/kjv --prompt_file=book.txt --score
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from absl import flags

from tvq_t5x.commands import command_line
from tvq_t5x.commands.sampling_options import Options
from tvq_t5x.common import quiet
from tvq_t5x.common.errors import ConfigError

_EXAMPLE = 'python -m tvq_t5x.sample --checkpoint=runs/kjv --prompt="In the beginning"'


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds T5X's flags and the command's own."""
  command_line.define_gin_flags(flag_values)
  command_line.define_checkpoint_flag(flag_values)
  fv: dict[str, Any] = {'flag_values': flag_values}
  flags.DEFINE_multi_string('prompt', [], 'Text to continue; repeat it for more.', **fv)
  path_flag = functools.partial(command_line.define_path_flag, **fv)
  path_flag(
    'prompt_file', None, 'File with the text to continue, of any length; - is standard input.'
  )
  flags.DEFINE_integer('num_samples', None, 'Continuations of each prompt; by default 1.', **fv)
  flags.DEFINE_integer(
    'max_tokens', None, 'Tokens of a continuation; by default 256, or a whole image.', **fv
  )
  flags.DEFINE_float(
    'temperature', None, "Of the softmax; 0 takes the likeliest token. By default the run's.", **fv
  )
  flags.DEFINE_float(
    'top_p', None, "Share of the probability mass to sample from; by default the run's.", **fv
  )
  flags.DEFINE_integer(
    'top_k', None, 'How many of the likeliest tokens to sample from; 0, the default, is all.', **fv
  )
  flags.DEFINE_integer('seed', None, 'Another one gives other samples; by default 0.', **fv)
  path_flag(
    'json', None, 'File for a line of JSON for each result, or - to print them instead of text.'
  )
  path_flag(
    'png', None, 'File for the images, if the task is one of images; by default samples.png.'
  )
  path_flag('state_in', None, 'File of a --state_out, to continue from there.')
  path_flag('state_out', None, 'File for the state at the end, from which --state_in continues.')
  flags.DEFINE_bool(
    'score', False, 'Print how well the prompts are predicted, and continue none.', **fv
  )
  flags.DEFINE_bool('per_token', False, 'With --score: a line for each token, too.', **fv)


def run(
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  search_paths: Sequence[str],
  checkpoint: str | None,
  options: Options,
  modules: Sequence[str] = (),
) -> int:
  """Prints continuations of prompts, or their scores.

  Returns:
    Exit code: 0, 1 for a checkpoint that can't be read, 2 for a wrong setting.
  """
  # Slow to import: --help should not wait for it.
  with quiet.imports():
    from tvq_t5x.commands import sampling_session
    from tvq_t5x.standalone import configuration

  def command() -> None:
    if not checkpoint:
      raise ConfigError(f'no --checkpoint was given: try {_EXAMPLE}')
    options.check()
    configured = configuration.configure(checkpoint, gin_files, gin_bindings, search_paths, modules)
    sampling_session.run(configured, options)

  return command_line.exit_code(command, gin_bindings)


def run_flags(values: flags.FlagValues) -> int:
  """`run` as the flags of `define_flags` say."""
  options = Options(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Options)})
  return run(
    values.gin_file,
    values.gin_bindings,
    values.gin_search_paths,
    values.checkpoint,
    options,
    values.module,
  )


def _main(args: Sequence[str]) -> int:
  command_line.prepare(args)
  return run_flags(flags.FLAGS)


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  command_line.start(_main)
