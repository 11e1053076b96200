"""Pictures of losses over tokens: of a run, and of several beside each other."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from tvq_t5x.common import errors, plots
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.standalone.run_records import LOSS, TEST, TRAIN, VALIDATION, Record

_BITS = 'bits_per_byte'
_BITS_UNIT = 'bits per byte'
# How a split is drawn, everywhere; a color is that of the run.
_LINES = {
  TRAIN: {'linewidth': 1, 'alpha': 0.5},
  VALIDATION: {'marker': '.'},
  TEST: {'marker': '*', 'linestyle': '', 'markersize': 9},
}


def write_curve(
  path: pathlib.Path,
  records: Sequence[Record],
  title: str,
  unit_of_loss: str = 'token',
  caption: str = '',
) -> np.ndarray | None:
  """Draws training, validation and test loss over tokens; replaces the files at once.

  Args:
    path: of the picture, a PNG file; there is a PDF file beside it.
    records: of the run.
    title: of the picture.
    unit_of_loss: what the cross entropy is of, `Model.UNIT`.
    caption: of the picture, such as the machine.

  Returns:
    The picture [height, width, 3] uint8; None if there was no folder to draw with.
  """
  try:
    drawn = of_runs({title: records}, unit_of_loss=unit_of_loss, caption=caption)
    plots.save_both(drawn, path)
    return plots.pixels(drawn)
  except OSError as e:  # matplotlib keeps its list of fonts in a folder, the home's or a temporary.
    if e.errno is not None:
      raise
    logging.warning('%s is not drawn: %s', path, errors.reason(e))
    return None


def of_runs(
  runs: Mapping[str, Sequence[Record]],
  metric: str | None = None,
  unit_of_loss: str | None = None,
  caption: str = '',
) -> Any:
  """Draws runs over tokens, each in a color of its own.

  Args:
    runs: records by the name of the run, which is the title of a single one.
    metric: its name; None means bits per byte where all have it, or else the cross entropy.
    unit_of_loss: what the cross entropy is of, if that is known.
    caption: of the picture.

  Returns:
    A `matplotlib.figure.Figure`.

  Raises:
    ConfigError: if a run has no metric of that name.
    OSError: if matplotlib finds no folder for its list of fonts.
  """
  single = len(runs) == 1
  given, metric = metric, metric or _metric(list(runs.values()))
  nats = f'nats per {unit_of_loss}' if unit_of_loss else 'nats'
  unit = {_BITS: _BITS_UNIT, LOSS: nats}.get(metric, metric)
  drawn = plots.figure(7, 4.5, caption)
  axes = drawn.subplots()
  values: list[float] = []
  for (name, records), color in zip(runs.items(), plots.colors(list(runs)).values(), strict=True):
    found = {split: _points(records, split, metric) for split in _LINES}
    if not any(found.values()) and (given or not single):
      known = sorted({k for r in records for k in r} - {'step', 'split', 'tokens'})
      raise ConfigError(f'{name} has no metric {metric!r}, but {", ".join(known) or "none"}.')
    for split, points in found.items():
      if points:
        x, y = zip(*points, strict=True)
        label = f'{split} {y[-1]:.3f}' if single else f'{name}, {split} {y[-1]:.3f}'
        axes.plot(x, y, label=label, color=color, **_LINES[split])
        values += y
  if single:
    axes.set_title(*runs, parse_math=False)  # Folders are called as anybody likes.
  _limit(axes, values)
  _explain(axes, f'last {unit}')
  axes.set(xlabel='tokens trained on', ylabel=unit)
  return drawn


def _metric(runs: Sequence[Sequence[Record]]) -> str:
  has_bits = [any(_BITS in record for record in records) for records in runs]
  return _BITS if all(has_bits) and has_bits else LOSS


def _points(records: Sequence[Record], split: str, metric: str) -> list[tuple[int, float]]:
  return [
    (r['tokens'], r[metric])
    for r in records
    if r['split'] == split and math.isfinite(r.get(metric, math.nan))
  ]


def _limit(axes: Any, values: Sequence[float]) -> None:
  """Leaves out the first updates, which would flatten all that comes after."""
  if values:
    low, high = min(values), sorted(values)[math.ceil(0.9 * (len(values) - 1))]
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 2 * margin)


def _explain(axes: Any, title: str) -> None:
  """The legend, the grid and the numbers of the axes."""
  from matplotlib.ticker import EngFormatter

  axes.xaxis.set_major_formatter(EngFormatter(sep=''))  # 2M in place of 2 and 1e6 elsewhere.
  axes.grid(alpha=0.3)
  if axes.lines:
    # A name that begins with _ would not be shown.
    labels = [line.get_label() for line in axes.lines]
    axes.legend(axes.lines, labels, title=title, fontsize='small')
    for text in axes.get_legend().get_texts():
      text.set_parse_math(False)
