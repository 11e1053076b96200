"""Command line of the standalone runner; `--help` lists the flags.

Example: python -m tvq_t5x.train --gin_file=gin/kjv_tiny.gin --gin.MODEL_DIR=\\"runs/kjv\\"

Exits with 0 when the run is finished, 1 if it failed, 2 for a wrong setting or flag, and with 128
and the number of the signal if it was stopped: 143 after SIGTERM, 130 after Ctrl-C. A run that was
stopped has a checkpoint, and the same command continues from it.
"""

import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from tvq_t5x.commands import command_line
from tvq_t5x.common import arguments, quiet
from tvq_t5x.common.errors import CheckpointError, ConfigError, Stopped, TrainingDiverged

if TYPE_CHECKING:
  from tvq_t5x.standalone.run import Run

_EXAMPLE = 'python -m tvq_t5x.train --gin_file=gin/kjv_tiny.gin --gin.MODEL_DIR=\\"runs/kjv\\"'


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds T5X's flags, --data_dir, --dry_run and --profile."""
  command_line.define_gin_flags(flag_values)
  command_line.define_data_flag(flag_values)
  flags.DEFINE_bool(
    'dry_run',
    False,
    'Print configuration, parameter count and the sharding of every array; train nothing.',
    flag_values,
  )
  flags.DEFINE_integer(
    'profile',
    None,
    'Updates to trace, after the first few, into MODEL_DIR/profile, for TensorBoard or Perfetto.',
    flag_values=flag_values,
  )


def train_model(
  gin_file: str | os.PathLike[str] | Sequence[str],
  model_dir: str | os.PathLike[str] | None = None,
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  data_dir: str | os.PathLike[str] | None = None,
  profile: int | None = None,
) -> 'Run':
  """Trains as `python -m tvq_t5x.train` does, from Python: in a notebook, say.

  Progress is logged. A run that was interrupted, by Ctrl-C or a kernel that stops, goes on when the
  same is called again.

  Args:
    gin_file: of the run, or several, where a later one holds.
    model_dir: folder of what the run writes; None means MODEL_DIR of the gin files.
    gin_bindings: more settings, as after `--gin.`: `['TRAIN_STEPS = 200']`.
    search_paths: more folders to look for gin files in.
    data_dir: folder of the task's data, or its file, where no setting says where it lies.
    profile: updates to trace, as `--profile`.

  Returns:
    The run: its metrics as tables, its curves; `load(run)` reads its newest checkpoint. The
    configuration that gin holds is another one than before.

  Raises:
    ConfigError: for settings that can't work, before anything is compiled.
    CheckpointError: if a checkpoint can't be written, or none can be read.
    TrainingDiverged: at a loss, gradient or parameter that is not finite.
    KeyboardInterrupt: after Ctrl-C, with a checkpoint.
    Stopped: after SIGTERM, with a checkpoint.
  """
  command_line.log_if_nobody_does()
  with quiet.imports():
    from tvq_t5x.gin_support import parsing

  gin_files = arguments.paths('gin_file', gin_file)
  bindings = arguments.texts('gin_bindings', gin_bindings)
  if model_dir is not None:
    bindings.append(f'MODEL_DIR = {arguments.path("model_dir", model_dir)!r}')
  folders = arguments.texts('search_paths', search_paths)
  data = None if data_dir is None else arguments.path('data_dir', data_dir)
  try:
    with parsing.plain_errors():
      _train(gin_files, bindings, folders, data, profile=profile)
  except Stopped as e:
    if e.number == signal.SIGINT:
      raise KeyboardInterrupt(*e.args) from None
    raise
  with quiet.imports():
    from tvq_t5x.standalone import configuration
    from tvq_t5x.standalone.run import Run

  return Run(configuration.setting('model_dir'))


def run(
  gin_files: Sequence[str],
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  dry_run: bool = False,
  data_dir: str | None = None,
  profile: int | None = None,
) -> int:
  """The command: trains as the gin files say, and prints what is wrong.

  Returns:
    Exit code: 0 when the run is finished, 1 for one that failed, 2 for a wrong setting, 128 and the
    number of the signal for one that was stopped with a checkpoint.
  """
  command_line.log_if_nobody_does()
  with quiet.imports():
    from tvq_t5x.gin_support import parsing

  try:
    _train(gin_files, gin_bindings, search_paths, data_dir, dry_run, profile)
  except ConfigError as e:
    return command_line.fail(parsing.message(e), 2)
  except (CheckpointError, TrainingDiverged) as e:
    return command_line.fail(parsing.message(e), 1)
  except Stopped as e:
    return 128 + e.number
  except OSError as e:
    # gin's copy of the error has no errno.
    if not any(os.strerror(number) in str(e) for number in command_line.NO_ROOM):
      raise
    return command_line.fail(f'{parsing.message(e)}; make room, the same command then continues', 1)
  return 0


def _train(
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  search_paths: Sequence[str],
  data_dir: str | None,
  dry_run: bool = False,
  profile: int | None = None,
) -> None:
  # Slow to import: --help should not wait for it.
  with quiet.imports():
    import tensorflow as tf

    from tvq_t5x.common import jax_modes
    from tvq_t5x.data import locations
    from tvq_t5x.gin_support import parsing
    from tvq_t5x.standalone import configuration, runner

  with quiet.calls():
    tf.config.set_visible_devices([], 'GPU')  # They are JAX's.
  if not gin_files:
    raise ConfigError(f'no --gin_file was given: try {_EXAMPLE}')
  if dry_run and profile is not None:
    raise ConfigError(f'--profile={profile}: a dry run trains nothing; leave one of them out.')
  parsing.parse_gin(gin_files, gin_bindings, search_paths)
  if not parsing.is_bound(runner.train):
    raise ConfigError(
      f"{', '.join(gin_files)}: nothing says what to train; add `include 'gin/runs/pretrain.gin'`"
    )
  with jax_modes.usual(), locations.data_dir(data_dir):
    runner.run(configuration.run_settings(), dry_run, profile)


def _main(args: Sequence[str]) -> int:
  command_line.prepare(args)
  values = flags.FLAGS
  return run(
    values.gin_file,
    values.gin_bindings,
    values.gin_search_paths,
    values.dry_run,
    values.data_dir,
    values.profile,
  )


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  command_line.start(_main)
