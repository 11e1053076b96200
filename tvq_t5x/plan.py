"""Compiles the program that trains on a batch for TPUs that are not there, and says what it takes.

Example: python -m tvq_t5x.plan --gin_file=gin/pg19_large.gin --topology=v3:8x8

Needs libtpu, and no TPU.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags, logging

from tvq_t5x.commands import command_line
from tvq_t5x.common import quiet
from tvq_t5x.common.errors import ConfigError

if TYPE_CHECKING:
  from tvq_t5x.planning.estimate import Estimate

_EXAMPLE = 'python -m tvq_t5x.plan --gin_file=gin/pg19_large.gin --topology=v3:8x8'


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds T5X's flags, and those of this command."""
  command_line.define_gin_flags(flag_values)
  flags.DEFINE_string(
    'topology', '', 'TPUs, such as v3:8x8: a kind, and the chips along each axis.', flag_values
  )
  flags.DEFINE_multi_string(
    'compare',
    [],
    'Another column: gin files and NAME=VALUE settings, with spaces between them, that come after '
    'the others; repeat it for more.',
    flag_values,
  )
  command_line.define_path_flag(
    'png', None, 'File to draw where the cycles go in, and one in .pdf beside it.', flag_values
  )


def run(
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  search_paths: Sequence[str],
  topology: str,
  compare: Sequence[str] = (),
  png: str | None = None,
) -> int:
  """Prints tables of what training on a batch takes.

  Returns:
    Exit code: 0 if it fits, 1 if it does not, 2 for a wrong setting.
  """
  # There may be libtpu, but there is no TPU.
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  with quiet.imports():
    from tvq_t5x.gin_support import parsing
    from tvq_t5x.planning import report, topologies

  try:
    if not gin_files or not topology:
      raise ConfigError(f'--gin_file and --topology have to be given: try {_EXAMPLE}')
    topologies.chip_of(topology)
    if png is not None and not png.endswith('.png'):
      raise ConfigError(f'--png={png}: give a file that ends in .png; a .pdf comes beside it.')
    command_line.check_output('--png', png)
    configurations = {'as given': (gin_files, gin_bindings)}
    for text in compare:
      files, bindings = _split(text)
      configurations[text] = ([*gin_files, *files], [*gin_bindings, *bindings])
    estimates = _estimates(configurations, search_paths, topology)
  except ConfigError as e:
    return command_line.fail(parsing.message(e), 2)
  print(report.tables(estimates))
  if png:
    report.draw(png, estimates)
  unfit = [x for x in estimates.values() if not x.fits]
  return command_line.fail('\n'.join(map(report.advice, unfit)), 1) if unfit else 0


def _split(text: str) -> tuple[list[str], list[str]]:
  """The gin files and the settings of a --compare."""
  words = text.split()
  settings = [word.removeprefix('--gin.') for word in words if '=' in word]
  if not words:
    raise ConfigError('--compare is empty: give gin files or NAME=VALUE.')
  return [word for word in words if '=' not in word], settings


def _estimates(
  configurations: dict[str, tuple[Sequence[str], Sequence[str]]],
  search_paths: Sequence[str],
  topology: str,
) -> 'dict[str, Estimate]':
  """What programs take, by name; all settings are checked before the first is compiled."""
  import jax

  from tvq_t5x.common import jax_modes
  from tvq_t5x.gin_support import parsing
  from tvq_t5x.planning import estimate, topologies
  from tvq_t5x.planning import program as program_lib

  devices, found = topologies.devices_of(topology), {}

  def program_of(files: Sequence[str], bindings: Sequence[str]) -> program_lib.Program:
    # Nothing is written, so a run without a folder is complete.
    parsing.parse_gin(files, ["MODEL_DIR = ''", *bindings], search_paths)
    return program_lib.configured_program(devices)

  with jax_modes.usual():
    for configuration in configurations.values():
      program_of(*configuration)
    logging.info('Compiling; the large models take minutes.')
    for name, configuration in configurations.items():
      # Anew: what is compiled asks gin for the settings of a user's own sublayers.
      program = program_of(*configuration)
      network = topologies.network_of(topology, list(program.partitioner.mesh.devices.flat))
      try:
        compiled = program_lib.compile_program(program)
        found[name] = estimate.estimate(program, topology, network, compiled)
      except jax.errors.JaxRuntimeError as e:
        found[name] = estimate.refused(program, topology, network, e)
  return found


def _main(args: Sequence[str]) -> int:
  command_line.prepare(args)
  x = flags.FLAGS
  return run(x.gin_file, x.gin_bindings, x.gin_search_paths, x.topology, x.compare, x.png)


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  command_line.start(_main)
