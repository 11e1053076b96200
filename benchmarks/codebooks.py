"""The quick start with codes that start from keys and codes that are replaced, and without.

  python benchmarks/codebooks.py --seeds=3 --steps=800 --out=runs/codebooks

trains gin/kjv_tiny.gin both ways and writes a table into docs/codebooks.md. The same command goes
on where it was interrupted; `--table_only` runs nothing.
"""

import pathlib
import statistics
from collections.abc import Sequence

import runs
from absl import app, flags
from runs import Model, Run

from tvq_t5x.common import machines

_SEEDS = flags.DEFINE_integer('seeds', 3, 'Runs of each.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 800, 'Updates, of 1,024 tokens each.', lower_bound=8)
_OUT = flags.DEFINE_string('out', 'runs/codebooks', 'Folder of the runs.')
_DOCS = flags.DEFINE_string('docs', str(runs.ROOT / 'docs'), 'Folder of codebooks.md.')
_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Writes what there is.')

_CONFIG = 'config.TransformerConfig'
_LIVING = {f'{_CONFIG}.codes_from_keys': True, f'{_CONFIG}.replace_below': 0.05}
MODELS = (Model('as in the paper'), Model('living codes', (), _LIVING))
_HEALTH = ('codebook_perplexity', 'codebook_dead_codes', 'quantization_error')


def _health(of_model: Sequence[Run], name: str) -> str:
  """The mean over finished runs and sublayers."""
  values = [
    value
    for run in of_model
    for key, value in (run.result or {}).items()
    if key.startswith(f'{name}/')
  ]
  return f'{statistics.mean(values):.3g}' if values else ''


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
  found = runs.of_seeds(_OUT.value, MODELS, _STEPS.value, _SEEDS.value)
  if not _TABLE_ONLY.value:
    runs.finish_seeds(found, 'bits_per_byte')
  lines = [
    '| | test bits per byte: mean (range) | perplexity | dead, share | quantization error |',
    '| --- | ---: | ---: | ---: | ---: |',
  ]
  for name, of_model in found.items():
    health = ' | '.join(_health(of_model, metric) for metric in _HEALTH)
    lines.append(f'| {name} | {runs.cell(of_model, "bits_per_byte")} | {health} |')
  table = '\n'.join(lines)
  print(table)
  text = f"""{table}

`gin/kjv_tiny.gin` after {_STEPS.value:,} updates, {_SEEDS.value} seeds; {machines.name()}. Made by

    python benchmarks/codebooks.py --seeds={_SEEDS.value} --steps={_STEPS.value}"""
  runs.write_part(pathlib.Path(_DOCS.value) / 'codebooks.md', 'the quick start', text)


if __name__ == '__main__':
  app.run(main)
