"""Converts models: a checkpoint to a folder that others can use, such a folder to a checkpoint.

Examples:

  python -m tvq_t5x.convert --checkpoint=runs/kjv --output=exported/kjv
  python -m tvq_t5x.convert --folder=exported/kjv --output=runs/back
  python -m tvq_t5x.convert --author_checkpoint=state_9 --author_settings=a.json --output=runs/a
"""

import dataclasses
from collections.abc import Sequence

from absl import flags

from tvq_t5x.commands import command_line
from tvq_t5x.common import quiet
from tvq_t5x.common.errors import ConfigError

_EXAMPLE = 'python -m tvq_t5x.convert --checkpoint=runs/kjv --output=exported/kjv'
_SOURCES = ('checkpoint', 'folder', 'author_checkpoint')
# Flags that are there for one source only.
_OF_SOURCE = {
  'dtype': 'checkpoint',
  'evaluation': 'checkpoint',
  'author_settings': 'author_checkpoint',
}
_DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class Options:
  """What to convert, by the names of the flags."""

  checkpoint: str | None = None
  folder: str | None = None
  author_checkpoint: str | None = None
  author_settings: str | None = None
  output: str | None = None
  dtype: str | None = None
  evaluation: str | None = None

  @property
  def source(self) -> str:
    """The name of what is converted.

    Raises:
      ConfigError: if that is none or several, or a flag is of no use with it.
    """
    given = [name for name in _SOURCES if getattr(self, name)]
    if len(given) != 1:
      names = ', '.join(f'--{name}' for name in given or _SOURCES)
      raise ConfigError(f'give one of {names}: try {_EXAMPLE}')
    for name, source in _OF_SOURCE.items():
      if getattr(self, name) is not None and source != given[0]:
        raise ConfigError(f'--{name} is for --{source}: leave it out.')
    return given[0]


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds T5X's flags and the command's own."""
  command_line.define_gin_flags(flag_values)
  command_line.define_checkpoint_flag(flag_values)
  texts = {
    'folder': 'Folder that this command has written, to be made a checkpoint again.',
    'author_checkpoint': "Checkpoint of the paper's own code: checkpoint_N, state_N or their "
    'folder.',
    'author_settings': 'File with the settings that it was trained with: JSON, config_NAME.py, or '
    'the command with its --NAME=VALUE.',
    'output': 'Folder to write: an exported one, or MODEL_DIR of a checkpoint.',
    'evaluation': 'File that `evaluate --json` has written, for the page that describes the model; '
    "by default the run's own numbers.",
  }
  for name, text in texts.items():
    command_line.define_path_flag(name, None, text, flag_values)
  flags.DEFINE_enum(
    'dtype',
    None,
    _DTYPES,
    'Of the exported arrays, codebooks apart; by default float32.',
    flag_values=flag_values,
  )


def run(
  options: Options,
  gin_files: Sequence[str] = (),
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  modules: Sequence[str] = (),
) -> int:
  """Converts a model.

  Returns:
    Exit code: 0, 1 for a checkpoint or folder that can't be read, 2 for a wrong setting.
  """
  command_line.log_if_nobody_does()
  # Slow to import: --help should not wait for it.
  with quiet.imports():
    import tensorflow as tf

    from tvq_t5x.interop import conversion

  with quiet.calls():
    tf.config.set_visible_devices([], 'GPU')  # They are JAX's.

  def command() -> None:
    source, output = options.source, conversion.check_output(options.output)
    gin = conversion.Gin(gin_files, gin_bindings, search_paths, modules)
    given = getattr(options, source)
    if source == 'checkpoint':
      dtype = options.dtype or _DTYPES[0]
      conversion.export(given, gin, output, dtype, options.evaluation)
    elif source == 'folder':
      conversion.restore(given, gin, output)
    else:
      conversion.convert_author(given, options.author_settings, gin, output)

  return command_line.exit_code(command)


def run_flags(values: flags.FlagValues) -> int:
  """`run` as the flags of `define_flags` say."""
  options = Options(**{f.name: getattr(values, f.name) for f in dataclasses.fields(Options)})
  return run(options, values.gin_file, values.gin_bindings, values.gin_search_paths, values.module)


def _main(args: Sequence[str]) -> int:
  command_line.prepare(args)
  return run_flags(flags.FLAGS)


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  command_line.start(_main)
