"""Draws the losses of runs, side by side.

Example: python -m tvq_t5x.plot runs/a runs/b --output=curves.pdf

Exits with 0, or 2 for a folder that is no run or a file that can't be written.
"""

import os
import pathlib
from collections.abc import Sequence

from absl import app, flags

from tvq_t5x.commands import command_line
from tvq_t5x.common import plots, quiet
from tvq_t5x.common.errors import ConfigError


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds the command's flags."""
  command_line.define_path_flag(
    'output', 'curves.png', f'File to write: {", ".join(plots.FORMATS)}.', flag_values
  )
  flags.DEFINE_string(
    'metric',
    None,
    'Name of a metric in metrics.jsonl; without it, bits_per_byte where all have it, or else '
    'cross_entropy.',
    flag_values,
  )


def run(folders: Sequence[str], output: str, metric: str | None = None) -> int:
  """Draws training, validation and test losses of runs over tokens.

  Args:
    folders: MODEL_DIRs of the standalone runner.
    output: path of the picture.
    metric: its name; None means bits per byte, or else nats a token.

  Returns:
    Exit code: 0, or 2 for a wrong setting.
  """
  with quiet.imports():
    from tvq_t5x.standalone import curves
    from tvq_t5x.standalone.run import Run
  try:
    if not folders:
      raise ConfigError('no run was given: try python -m tvq_t5x.plot runs/a runs/b')
    if not output.endswith(plots.FORMATS):
      raise ConfigError(
        f'--output={output}: give a file that ends in {" or ".join(plots.FORMATS)}.'
      )
    command_line.check_output('--output', output)
    runs = {}
    for folder in dict.fromkeys(os.path.normpath(os.path.expanduser(x)) for x in folders):
      runs[folder] = Run(folder).records()
    plots.save(curves.of_runs(runs, metric), pathlib.Path(output))
  except ConfigError as e:
    return command_line.fail(str(e), 2)
  print(f'Wrote {output}.')
  return 0


def _main(args: Sequence[str]) -> int:
  folders = args[1:]
  if unknown := [x for x in folders if x.startswith('-')]:
    raise app.UsageError(f'Not a flag: {unknown[0]}')
  return run(folders, flags.FLAGS.output, flags.FLAGS.metric)


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  command_line.start(_main)
