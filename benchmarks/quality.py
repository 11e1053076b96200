"""Language models on the King James Bible, byte by byte: as many parameters and tokens, the same
optimizer.

  python benchmarks/quality.py --seeds=3 --steps=800 --out=runs/quality

trains quadratic attention, Transformer-VQ, LongVQ and its state-space layers without attention, and
writes a table and curves into docs/. At last a short run of each, one after the other, tells how
fast they are: nothing else should run then. The same command goes on where it was interrupted;
`--table_only` runs nothing.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import runs
from absl import app, flags
from matplotlib.ticker import EngFormatter
from runs import Model, Run

from tvq_t5x.common import machines, plots

_SEEDS = flags.DEFINE_integer('seeds', 3, 'Runs of each model.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 800, 'Updates, of 1,024 tokens each.', lower_bound=8)
_OUT = flags.DEFINE_string('out', 'runs/quality', 'Folder of the runs.')
_DOCS = flags.DEFINE_string(
  'docs', str(runs.ROOT / 'docs'), 'Folder of quality.md and quality.png.'
)
_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Writes what there is.')

_WIDTH = 'config.TransformerConfig.mlp_dim'
# The widths make the parameters the same within 3%.
MODELS = (
  runs.QUADRATIC,
  runs.TRANSFORMER_VQ,
  Model('LongVQ', runs.LONGVQ, {_WIDTH: 336}),
  Model('SSM only', runs.LONGVQ, {_WIDTH: 768, 'longvq.LongVQ.attention': 'none'}),
)
_TOKENS_OF_A_STEP = 1024
_MOST_APART = 0.03
_STEPS_FOR_SPEED = 120


def _speed_run(model: Model) -> Run:
  steps = _STEPS_FOR_SPEED
  run = runs.of_kjv(f'{_OUT.value}/speed', model, steps, seed=0)
  settings = {**run.settings, 'LOG_PERIOD': 20, 'EVAL_PERIOD': steps, 'CHECKPOINT_PERIOD': steps}
  return dataclasses.replace(run, settings=settings)


def _table(found: dict[str, list[Run]]) -> str:
  lines = [
    '| | parameters | test bits per byte: mean (range) | tokens/s |',
    '| --- | ---: | ---: | ---: |',
  ]
  for name, of_model in found.items():
    sizes = [run.num_params for run in of_model if run.num_params]
    tokens_per_second = _speed_run(of_model[0].model).tokens_per_second
    size = f'{sizes[0]:,}' if sizes else ''
    speed = f'{tokens_per_second:,.0f}' if tokens_per_second else ''
    lines.append(f'| {name} | {size} | {runs.cell(of_model, "bits_per_byte")} | {speed} |')
  return '\n'.join(lines)


def _plot(found: dict[str, list[Run]], path: pathlib.Path) -> None:
  caption = f'The King James Bible, byte by byte, {_SEEDS.value} seeds; {machines.name()}'
  figure = plots.figure(7, 4.5, caption)
  axis = figure.subplots()
  for name, color in plots.colors(list(found)).items():
    for run in found[name]:
      for split, style in (('train', {'lw': 1, 'alpha': 0.5}), ('validation', {'marker': '.'})):
        records = run.records(split)
        tokens, bits = ([r[x] for r in records] for x in ('tokens', 'bits_per_byte'))
        label = f'{name}, {split}' if run is found[name][0] else None
        axis.plot(tokens, bits, color=color, label=label, **style)
  axis.set(xlabel='tokens trained on', ylabel='bits per byte', ylim=(1.7, 3.5))
  axis.xaxis.set_major_formatter(EngFormatter(sep=''))
  axis.grid(alpha=0.3)
  axis.legend(fontsize='small')
  plots.save_both(figure, path)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}')
  found = runs.of_seeds(_OUT.value, MODELS, _STEPS.value, _SEEDS.value)
  if not _TABLE_ONLY.value:
    runs.finish_seeds(found, 'bits_per_byte')
    runs.finish_all(map(_speed_run, MODELS), 'bits_per_byte')
  sizes = [of_model[0].num_params for of_model in found.values() if of_model[0].num_params]
  if sizes and max(sizes) / min(sizes) > (1 + _MOST_APART) / (1 - _MOST_APART):
    raise SystemExit(f'The models are of different sizes: {sizes}.')
  table = _table(found)
  print(table)
  docs = pathlib.Path(_DOCS.value)
  _plot(found, docs / 'quality.png')
  text = f"""{table}

After {_STEPS.value:,} updates, {_STEPS.value * _TOKENS_OF_A_STEP:,} tokens, of each of
{_SEEDS.value} seeds; {machines.name()}. Made by

    python benchmarks/quality.py --seeds={_SEEDS.value} --steps={_STEPS.value}

![Bits per byte over training](quality.png)"""
  runs.write_part(docs / 'quality.md', 'language modeling', text)


if __name__ == '__main__':
  app.run(main)
