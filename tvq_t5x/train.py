"""Command line of the standalone runner; `--help` lists the flags.

Example: python -m tvq_t5x.train --gin_file=gin/kjv_tiny.gin --gin.MODEL_DIR=\\"runs/kjv\\"

Exits with 0 when the run is finished, 1 if it failed, 2 for a wrong setting or flag, and with 128
and the number of the signal if it was stopped: 143 after SIGTERM, 130 after Ctrl-C. A run that was
stopped has a checkpoint, and the same command continues from it.
"""

import os
from collections.abc import Sequence

from absl import flags

from tvq_t5x.commands import command_line
from tvq_t5x.common import quiet
from tvq_t5x.common.errors import CheckpointError, ConfigError, Stopped, TrainingDiverged

_EXAMPLE = 'python -m tvq_t5x.train --gin_file=gin/kjv_tiny.gin --gin.MODEL_DIR=\\"runs/kjv\\"'


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds T5X's flags, --data_dir and --dry_run."""
  command_line.define_gin_flags(flag_values)
  command_line.define_data_flag(flag_values)
  flags.DEFINE_bool(
    'dry_run',
    False,
    'Print configuration, parameter count and the sharding of every array; train nothing.',
    flag_values,
  )


def run(
  gin_files: Sequence[str],
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  dry_run: bool = False,
  data_dir: str | None = None,
) -> int:
  """Trains as the gin files say.

  Returns:
    Exit code: 0 when the run is finished, 1 for one that failed, 2 for a wrong setting, 128 and the
    number of the signal for one that was stopped with a checkpoint.
  """
  command_line.log_if_nobody_does()
  # Slow to import: --help should not wait for it.
  with quiet.imports():
    import tensorflow as tf

    from tvq_t5x.common import jax_modes
    from tvq_t5x.data import locations
    from tvq_t5x.gin_support import parsing
    from tvq_t5x.standalone import configuration, runner

  tf.config.set_visible_devices([], 'GPU')  # They are JAX's.
  try:
    if not gin_files:
      raise ConfigError(f'no --gin_file was given: try {_EXAMPLE}')
    locations.set_data_dir(data_dir)
    parsing.parse_gin(gin_files, gin_bindings, search_paths)
    if not parsing.is_bound(runner.train):
      raise ConfigError(
        f"{', '.join(gin_files)}: nothing says what to train; add `include 'gin/runs/pretrain.gin'`"
      )
    with jax_modes.usual():
      runner.run(configuration.run_settings(), dry_run)
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


def _main(args: Sequence[str]) -> int:
  command_line.prepare(args)
  values = flags.FLAGS
  return run(
    values.gin_file,
    values.gin_bindings,
    values.gin_search_paths,
    values.dry_run,
    values.data_dir,
  )


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  command_line.start(_main)
