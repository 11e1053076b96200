"""Pictures of losses over tokens: of a run, and of several beside each other."""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from tvq_t5x.common import errors, files
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.standalone.run_log import LOSS, TEST, TRAIN, VALIDATION, Record

_BITS = 'bits_per_byte'
_BITS_UNIT = 'bits per byte'
# How a split is drawn, everywhere.
_LINES = {
  TRAIN: {'linewidth': 1},
  VALIDATION: {'marker': '.'},
  TEST: {'marker': '*', 'linestyle': ''},
}
_COLORS = {TRAIN: 'tab:blue', VALIDATION: 'tab:orange', TEST: 'tab:green'}


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
  metric = _metric([records])

  def draw(axes: Any) -> None:
    drawn = []
    for split, style in _LINES.items():
      if points := _points(records, split, metric):
        tokens, values = zip(*points, strict=True)
        axes.plot(tokens, values, label=_label(split, values), color=_COLORS[split], **style)
        drawn += values
    _limit(axes, drawn)
    if drawn:
      axes.legend(title=f'last {unit}')
    axes.set_title(title, parse_math=False)  # Folders are called as anybody likes.

  unit = _BITS_UNIT if metric == _BITS else f'nats per {unit_of_loss}'
  _write(path, unit, draw)


def write_comparison(
  path: pathlib.Path, runs: Mapping[str, Sequence[Record]], metric: str | None = None
) -> None:
  """Draws several runs, each in a color of its own; replaces the file at once.

  Args:
    path: of the picture, in the format that its ending says.
    runs: records by the name of the run.
    metric: its name; None means bits per byte where all have it, or else nats per token.

  Raises:
    ConfigError: if a run has no such metric.
  """
  metric = metric or _metric(list(runs.values()))

  def draw(axes: Any) -> None:
    drawn = []
    for i, (name, records) in enumerate(runs.items()):
      found = {split: _points(records, split, metric) for split in _LINES}
      if not any(found.values()):
        known = sorted({k for r in records for k in r} - {'step', 'split', 'tokens'})
        raise ConfigError(f'{name} has no metric {metric!r}, but {", ".join(known) or "none"}.')
      for split, points in found.items():
        if points:
          tokens, values = zip(*points, strict=True)
          style = {**_LINES[split], 'color': f'C{i}', 'alpha': 0.4 if split == TRAIN else 1}
          axes.plot(tokens, values, label=f'{name}, {_label(split, values)}', **style)
          drawn += values
    _limit(axes, drawn)
    # A name that begins with _ would not be shown.
    handles, labels = axes.lines, [line.get_label() for line in axes.lines]
    axes.legend(handles, labels, fontsize='small')

  _write(path, {_BITS: _BITS_UNIT, LOSS: 'nats'}.get(metric, metric), draw)


def _metric(runs: Sequence[Sequence[Record]]) -> str:
  has_bits = [any(_BITS in record for record in records) for records in runs]
  return _BITS if all(has_bits) and has_bits else LOSS


def _points(records: Sequence[Record], split: str, metric: str) -> list[tuple[int, float]]:
  return [
    (r['tokens'], r[metric])
    for r in records
    if r['split'] == split and math.isfinite(r.get(metric, math.nan))
  ]


def _label(split: str, values: Sequence[float]) -> str:
  return f'{split} {values[-1]:.3f}'


def _limit(axes: Any, drawn: Sequence[float]) -> None:
  """Leaves out the first updates, which would flatten all that comes after."""
  if drawn:
    low, high = min(drawn), sorted(drawn)[math.ceil(0.9 * (len(drawn) - 1))]
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 2 * margin)


def _write(path: pathlib.Path, unit: str, draw: Callable[[Any], None]) -> None:
  """Writes what is drawn on axes."""
  try:
    # Not at import: a dry run draws nothing, and matplotlib takes its time.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
  except OSError as e:  # It keeps its list of fonts in a folder, the home's or a temporary one.
    logging.warning('%s is not drawn: %s', path, errors.reason(e))
    return
  figure = Figure(figsize=(7, 4.5), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  draw(axes)
  axes.set(xlabel='tokens trained on', ylabel=unit)
  axes.xaxis.set_major_formatter(EngFormatter(sep=''))  # 2M in place of 2 and 1e6 elsewhere.
  axes.grid(alpha=0.3)
  with files.replacing(path) as f:
    figure.savefig(f, format=path.suffix[1:], dpi=120)
