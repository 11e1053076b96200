"""Evaluates a checkpoint on a split of its task, exactly: every token counts once.

Example: python -m tvq_t5x.evaluate --checkpoint=runs/kjv --split=test
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from tvq_t5x.commands import command_line
from tvq_t5x.common import files, quiet
from tvq_t5x.common.errors import ConfigError

_EXAMPLE = 'python -m tvq_t5x.evaluate --checkpoint=runs/kjv --split=test'
# Rows of the table, in this order; the codebooks' metrics are in the JSON.
_SHOWN = (
  'bits_per_byte',
  'bits_per_dimension',
  'cross_entropy',
  'perplexity',
  'word_perplexity',
  'accuracy',
  'examples',
  'examples_cut',
  'tokens',
  'bytes',
  'dimensions',
  'seconds',
)


def define_flags(flag_values: flags.FlagValues) -> None:
  """Adds T5X's flags and the command's own."""
  command_line.define_gin_flags(flag_values)
  command_line.define_checkpoint_flag(flag_values)
  command_line.define_data_flag(flag_values)
  flags.DEFINE_string(
    'split', None, "Split of the task to evaluate; by default the run's validation.", flag_values
  )
  command_line.define_path_flag(
    'json', None, 'File to write the results to, or - to print them in place of the table.',
    flag_values,
  )  # fmt: skip
  command_line.define_path_flag(
    'predictions', None,
    "File for a classifier's predictions: a line of JSON for each example, in the split's order.",
    flag_values,
  )  # fmt: skip
  flags.DEFINE_bool(
    'carry_state',
    False,
    'Read the split as BATCH_SIZE long stretches, in which each token is predicted from all before '
    'it; else from those of its sequence.',
    flag_values,
  )


def run(
  gin_files: Sequence[str],
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str] = (),
  checkpoint: str | None = None,
  split: str | None = None,
  json_file: str | None = None,
  carry_state: bool = False,
  data_dir: str | None = None,
  modules: Sequence[str] = (),
  predictions_file: str | None = None,
) -> int:
  """Evaluates a checkpoint, prints a table and writes JSON.

  Returns:
    Exit code: 0, 1 for a checkpoint that can't be read, 2 for a wrong setting.
  """
  command_line.log_if_nobody_does()
  # Slow to import: --help should not wait for it.
  with quiet.imports():
    import tensorflow as tf

    from tvq_t5x.data import locations
    from tvq_t5x.standalone import checkpoint_evaluation, configuration

  with quiet.calls():
    tf.config.set_visible_devices([], 'GPU')  # They are JAX's.

  def command() -> None:
    if not checkpoint:
      raise ConfigError(f'no --checkpoint was given: try {_EXAMPLE}')
    command_line.check_output('--json', json_file)
    if predictions_file == '-':
      raise ConfigError('--predictions=-: give the path of a file.')
    command_line.check_output('--predictions', predictions_file)
    configured = configuration.configure(checkpoint, gin_files, gin_bindings, search_paths, modules)
    with locations.data_dir(data_dir):
      found = checkpoint_evaluation.evaluate(configured, split, carry_state, predictions_file)
    _write(found, json_file)

  return command_line.exit_code(command, gin_bindings)


def _write(result: dict[str, Any], json_file: str | None) -> None:
  line = files.json_line(result)
  if json_file == '-':
    print(line, end='')
    return
  how = ', state carried on' if result['carry_state'] else ''
  print(f'{result["task"]}, {result["split"]}, {result["checkpoint"]}{how}')
  print(command_line.table({name: result[name] for name in _SHOWN if name in result}))
  if json_file:
    with open(json_file, 'w', encoding='utf-8') as f:
      f.write(line)


def run_flags(values: flags.FlagValues) -> int:
  """`run` as the flags of `define_flags` say."""
  return run(
    values.gin_file,
    values.gin_bindings,
    values.gin_search_paths,
    values.checkpoint,
    values.split,
    values.json,
    values.carry_state,
    values.data_dir,
    values.module,
    values.predictions,
  )


def _main(args: Sequence[str]) -> int:
  command_line.prepare(args)
  return run_flags(flags.FLAGS)


if __name__ == '__main__':
  define_flags(flags.FLAGS)
  command_line.start(_main)
