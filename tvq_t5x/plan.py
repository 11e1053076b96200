"""Compiles the program that trains on a batch for TPUs that are not there, and says what it takes.

Example: python -m tvq_t5x.plan --gin_file=gin/pg19_large.gin --topology=v3:8x8

Needs libtpu, and no TPU.
"""

import os
from collections.abc import Sequence

from absl import flags, logging

from tvq_t5x.commands import command_line
from tvq_t5x.common import quiet
from tvq_t5x.common.errors import ConfigError

_EXAMPLE = 'python -m tvq_t5x.plan --gin_file=gin/pg19_large.gin --topology=v3:8x8'


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds T5X's flags, and --topology."""
  command_line.define_gin_flags(flag_values)
  flags.DEFINE_string(
    'topology', '', 'TPUs, such as v3:8x8: a kind, and the chips along each axis.', flag_values
  )


def run(
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  search_paths: Sequence[str],
  topology: str,
) -> int:
  """Prints a table of what training on a batch takes.

  Returns:
    Exit code: 0 if it fits, 1 if it does not, 2 for a wrong setting.
  """
  # There may be libtpu, but there is no TPU.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  with quiet.imports():
    import jax

    from tvq_t5x.common import jax_modes
    from tvq_t5x.gin_support import parsing
    from tvq_t5x.planning import program as program_lib
    from tvq_t5x.planning import report, topologies

  try:
    if not gin_files or not topology:
      raise ConfigError(f'--gin_file and --topology have to be given: try {_EXAMPLE}')
    chip = topologies.chip_of(topology)
    # Nothing is written, so a run without a folder is complete.
    parsing.parse_gin(gin_files, ["MODEL_DIR = ''", *gin_bindings], search_paths)
    devices = topologies.devices_of(topology)
    with jax_modes.usual():
      program = program_lib.configured_program(devices)
    logging.info('Compiling; the large models take minutes.')
    try:
      with jax_modes.usual():
        compiled = program_lib.compile_program(program)
      estimate = report.estimate(program, topology, chip, compiled)
    except jax.errors.JaxRuntimeError as e:
      estimate = report.refused(program, topology, chip, e)
  except ConfigError as e:
    return command_line.fail(parsing.message(e), 2)
  print(report.table(estimate))
  if estimate.fits:
    return 0
  return command_line.fail(report.advice(estimate), 1)


def _main(args: Sequence[str]) -> int:
  command_line.prepare(args)
  values = flags.FLAGS
  return run(values.gin_file, values.gin_bindings, values.gin_search_paths, values.topology)


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  command_line.start(_main)
