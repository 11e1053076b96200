"""What a benchmark leaves: a record of its results, and a plot of speed and memory."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tvq_t5x.common import plots

_STYLES = ('o-', 's--', '^:')


class Line(NamedTuple):
  """A line of a plot: the values at some sizes."""

  sizes: list[float]
  values: list[float]


def write(out_dir: str, name: str, module: str, results: Sequence[Any]) -> None:
  """Writes `name.json`: results, the flags of the benchmark and the device.

  Args:
    out_dir: folder; it is created.
    name: of the file.
    module: whose flags they are.
    results: dataclasses.
  """
  os.makedirs(out_dir, exist_ok=True)
  device = jax.devices()[0]
  record = {
    'device': f'{device.platform}: {device.device_kind}',
    'jax': jax.__version__,
    'flags': {f.name: f.value for f in flags.FLAGS.get_key_flags_for_module(module)},
    'results': [dataclasses.asdict(r) for r in results],
  }
  with open(os.path.join(out_dir, f'{name}.json'), 'w', encoding='utf-8') as f:
    json.dump(record, f, indent=2)


def name_of(variant: str) -> str:
  """A variant of the tables as it is called in pictures: the model, and how it is computed."""
  if variant.startswith('quadratic'):
    return variant
  return 'Transformer-VQ' if variant == 'vq' else f'Transformer-VQ, {variant}'


def plot(
  path: pathlib.Path, xlabel: str, panels: Mapping[str, Mapping[str, Line]], caption: str
) -> None:
  """Draws panels side by side, by title, with a line for each variant; all axes logarithmic.

  Args:
    path: of a PNG file, with a PDF file beside it.
    xlabel: what the sizes are.
    panels: by title, lines by the name of the variant, 'MODEL' or 'MODEL, HOW'.
    caption: what was measured, on which machine.
  """
  figure = plots.figure(10, 4.2, caption)
  for axis, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
    models = [variant.partition(', ')[0] for variant in lines]
    colors = plots.colors(models)
    for i, (variant, line) in enumerate(lines.items()):
      style = _STYLES[models[:i].count(models[i])]  # Of a model's first, second, ... variant.
      axis.plot(line.sizes, line.values, style, color=colors[models[i]], label=variant)
    axis.set(xscale='log', yscale='log', xlabel=xlabel, title=title)
    sizes = sorted({size for line in lines.values() for size in line.sizes})
    axis.set_xticks(sizes, [_shortly(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:,g}'))
    axis.grid(alpha=0.3)
    if axis is figure.axes[0]:
      axis.legend(fontsize='small')
  plots.save_both(figure, path)


def _shortly(size: float) -> str:
  """A power of two in units of 1,024 or 1,048,576, others as they are."""
  for unit, letter in ((2**20, 'M'), (2**10, 'k')):
    if size >= unit and (size / unit).is_integer():
      return f'{size // unit:.0f}{letter}'
  return f'{size:,.0f}'
