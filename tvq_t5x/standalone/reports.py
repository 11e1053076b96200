"""Pictures and tables of a run: the curve, the table of a dry run."""

import math
import pathlib
from collections.abc import Sequence

import jax
from absl import logging

from tvq_t5x.common import errors, files, words
from tvq_t5x.standalone.run_log import LOSS, TEST, TRAIN, VALIDATION, Record
from tvq_t5x.training.placement import StateInfo


def write_curve(
  path: pathlib.Path, records: Sequence[Record], title: str, unit_of_loss: str = 'token'
) -> None:
  """Draws training, validation and test loss over tokens; replaces the file at once.

  Args:
    path: of the picture.
    records: of the run.
    title: of the picture.
    unit_of_loss: what the cross entropy is of, `Model.UNIT`.
  """
  try:
    # Not at import: a dry run draws nothing, and matplotlib takes its time.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except OSError as e:  # It keeps its list of fonts in a folder, the home's or a temporary one.
    logging.warning('%s is not drawn: %s', path, errors.reason(e))
    return

  bits = any('bits_per_byte' in record for record in records)
  metric, unit = ('bits_per_byte', 'bits per byte') if bits else (LOSS, f'nats per {unit_of_loss}')
  figure = Figure(figsize=(7, 4.5), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  styles = {
    TRAIN: {'color': 'tab:blue', 'linewidth': 1},
    VALIDATION: {'color': 'tab:orange', 'marker': '.'},
    TEST: {'color': 'tab:green', 'marker': '*', 'linestyle': ''},
  }
  drawn = []
  for split, style in styles.items():
    points = [
      (r['tokens'], r[metric])
      for r in records
      if r['split'] == split and math.isfinite(r.get(metric, math.nan))
    ]
    if points:
      tokens, values = zip(*points, strict=True)
      axes.plot(tokens, values, label=f'{split} {values[-1]:.3f}', **style)
      drawn += values
  if drawn:
    # The first updates would flatten all that comes after.
    low, high = min(drawn), sorted(drawn)[math.ceil(0.9 * (len(drawn) - 1))]
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 2 * margin)
    axes.legend(title=f'last {unit}')
  axes.set(xlabel='tokens trained on', ylabel=unit)
  axes.set_title(title, parse_math=False)  # Folders are called as anybody likes.
  axes.grid(alpha=0.3)
  with files.replacing(path) as f:
    figure.savefig(f, format='png', dpi=120)


def state_table(info: StateInfo) -> str:
  """A line for each array of the train state, and totals."""
  rows = [
    (row.name, str(list(row.shape)), row.dtype, str(list(row.logical_axes)), str(row.spec))
    for row in info.rows
  ]
  head = ('array', 'shape', 'dtype', 'logical axes', 'sharding')
  widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
  lines = [
    '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in [head, *rows]
  ]
  return '\n'.join(
    [
      *lines,
      '',
      f'parameters: {info.num_parameters:,}',
      f'train state: {words.size(info.num_bytes)}, '
      f'{words.size(info.num_bytes_per_device)} on each device',
    ]
  )


def mesh(devices: jax.sharding.Mesh) -> str:
  """A mesh in words, such as '8 cpu devices (data 4 x model 2)'."""
  kind = devices.devices.flat[0].platform
  plural = 's' if devices.size > 1 else ''
  axes = ' x '.join(f'{name} {length}' for name, length in devices.shape.items())
  return f'{devices.size} {kind} device{plural} ({axes})'
