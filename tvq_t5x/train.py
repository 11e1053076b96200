"""Command line of the standalone runner; `--help` lists the flags.

Example: python -m tvq_t5x.train --gin_file=gin/kjv_tiny.gin --gin.MODEL_DIR=\\"runs/kjv\\"
"""

import contextlib
import errno
import logging as std_logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

from absl import app, flags, logging

from tvq_t5x.errors import CheckpointError, ConfigError, TrainingDiverged

_EXAMPLE = 'python -m tvq_t5x.train --gin_file=gin/kjv_tiny.gin --gin.MODEL_DIR=\\"runs/kjv\\"'


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds T5X's flags, and --dry_run."""
  flags.DEFINE_multi_string(
    'gin_file', [], 'Gin file; repeat it for more, where a later one holds.', flag_values
  )
  flags.DEFINE_multi_string(
    'gin_bindings', [], 'A setting NAME=VALUE; --gin.NAME=VALUE is the same.', flag_values
  )
  flags.DEFINE_list(
    'gin_search_paths', [], 'More folders to look for gin files in, with commas.', flag_values
  )
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
) -> int:
  """Trains as the gin files say.

  Returns:
    Exit code: 0 at the end, after SIGTERM or SIGINT, 1 for a run that failed, 2 for a wrong
    setting.
  """
  # Slow to import: --help should not wait for it.
  with _quiet_imports():
    import gin
    import tensorflow as tf

    from tvq_t5x import gin_utils
    from tvq_t5x.standalone import runner

  tf.config.set_visible_devices([], 'GPU')  # They are JAX's.
  try:
    if not gin_files:
      raise ConfigError(f'no --gin_file was given: try\n{_EXAMPLE}')
    gin_utils.parse_gin(gin_files, gin_bindings, search_paths)
    if not gin_utils.is_bound(runner.train):
      raise ConfigError(
        f"{', '.join(gin_files)}: nothing says what to train; add `include 'gin/runs/pretrain.gin'`"
      )
    gin.get_configurable(runner.train)(dry_run=dry_run)
  except ConfigError as e:
    return _fail(gin_utils.message(e), 2)
  except (CheckpointError, TrainingDiverged) as e:
    return _fail(gin_utils.message(e), 1)
  except OSError as e:
    # gin's copy of the error has no errno.
    if not any(os.strerror(number) in str(e) for number in (errno.ENOSPC, errno.EDQUOT)):
      raise
    return _fail(f'{gin_utils.message(e)}; make room, the same command then continues', 1)
  return 0


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
  """Holds back what TensorFlow's libraries print while they load, unless something is wrong."""
  if logging.get_verbosity() > logging.INFO:
    yield
    return
  sys.stderr.flush()
  terminal = os.dup(2)
  with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    try:
      yield
    except BaseException:
      held.seek(0)
      os.write(terminal, held.read())
      raise
    finally:
      os.dup2(terminal, 2)
      os.close(terminal)


def _fail(message: str, code: int) -> int:
  logging.flush()
  print('error: ' + message.replace('\n', '\n  '), file=sys.stderr, flush=True)
  return code


def _parse_flags(args: Sequence[str]) -> list[str]:
  from tvq_t5x import gin_utils

  try:
    args = gin_utils.rewrite_gin_args(args)
  except ConfigError as e:
    sys.exit(_fail(str(e), 2))
  return app.parse_flags_with_usage(list(args))


def _main(args: Sequence[str]) -> int:
  if len(args) > 1:
    raise app.UsageError(f'Not a flag: {args[1]}')
  handler = logging.get_absl_handler()
  handler.setFormatter(std_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  if logging.get_verbosity() <= logging.INFO:
    # Orbax has several lines to say of each step of a save, and JAX of devices that are not there.
    ours = os.path.dirname(__file__)
    handler.addFilter(lambda r: r.levelno > std_logging.INFO or r.pathname.startswith(ours))
  values = flags.FLAGS
  return run(values.gin_file, values.gin_bindings, values.gin_search_paths, values.dry_run)


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  app.run(_main, flags_parser=_parse_flags)
