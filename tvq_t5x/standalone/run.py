"""A run from Python: what it measured as tables, and its curves."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tvq_t5x.common import files, plots, words
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.standalone import curves, run_records
from tvq_t5x.standalone.run_records import TEST, TRAIN, VALIDATION, Record

# Rows of a table that are shown at its begin and its end.
_SHOWN = 5


class Table(dict[str, np.ndarray]):
  """Columns of equal length by name, which a notebook shows as a table.

  `pandas.DataFrame(table)` has the same columns. What was not measured in a row is NaN.
  """

  @property
  def num_rows(self) -> int:
    """The number of rows."""
    return len(next(iter(self.values()), ()))

  def __repr__(self) -> str:
    return '\n'.join(words.aligned(self._cells()))

  def _repr_html_(self) -> str:
    head, *rows = self._cells()
    lines = [''.join(f'<th>{cell}</th>' for cell in head)]
    lines += [''.join(f'<td>{cell}</td>' for cell in row) for row in rows]
    return f'<table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'

  def _cells(self) -> list[list[str]]:
    """The first and the last rows, without what there is for each layer."""
    columns = [name for name in self if '/' not in name]
    left_out = len(self) - len(columns)
    rows = list(range(self.num_rows))
    shown = [[_cell(self[name][i]) for name in columns] for i in rows]
    if len(rows) > 2 * _SHOWN:
      shown[_SHOWN:-_SHOWN] = [['...'] * len(columns)]
    if left_out:
      columns, shown = [*columns, f'({left_out} more columns)'], [[*row, ''] for row in shown]
    return [columns, *shown]


def _cell(value: Any) -> str:
  return f'{value:,}' if isinstance(value, int | np.integer) else f'{value:.4g}'


class Curves:
  """A picture that a notebook shows in place.

  Attributes:
    figure: a `matplotlib.figure.Figure`.
  """

  def __init__(self, figure: Any):
    self.figure = figure

  def __repr__(self) -> str:
    return 'Curves: a notebook shows them, and save(path) writes them'

  def _repr_png_(self) -> bytes:
    return plots.png(self.figure)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes it as PNG, PDF or SVG, as the path ends.

    Raises:
      ConfigError: for another ending.
    """
    path = pathlib.Path(path)
    if path.suffix not in plots.FORMATS:
      raise ConfigError('path', str(path), f'one that ends in {" or ".join(plots.FORMATS)}')
    plots.save(self.figure, path)


class Run:
  """A run of the standalone runner, finished or not: what its folder holds.

  It stands for the folder's path, so that `tvq_t5x.load(run)` reads its newest checkpoint.

  Attributes:
    model_dir: absolute path of the folder.
  """

  def __init__(self, model_dir: str | os.PathLike[str]):
    """Reads nothing yet.

    Args:
      model_dir: of the run.

    Raises:
      ConfigError: if no run has written there.
    """
    given = os.fspath(model_dir)
    self.model_dir = files.absolute(given, f'model_dir = {given!r}')
    self._path = self.model_dir / run_records.RECORDS
    if not self._path.is_file():
      raise ConfigError(f'{given} is no folder of a run: there is no {self._path}.')

  def __fspath__(self) -> str:
    return str(self.model_dir)

  def __repr__(self) -> str:
    records = self.records()
    step = max((r['step'] for r in records), default=0)
    lines = [f'Run({str(self.model_dir)!r}), step {step:,}']
    for split in (TRAIN, VALIDATION, TEST):
      found = [r for r in records if r['split'] == split]
      if found:
        lines.append(f'  {split} at step {found[-1]["step"]:,}: {run_records.shortly(found[-1])}')
    return '\n'.join(lines)

  def metrics(self, split: str = VALIDATION) -> Table:
    """What was measured on a split: a row for each time, in the order of steps.

    Args:
      split: 'train', 'validation' or 'test'.

    Returns:
      Columns [n] by name: `step`, `tokens` trained on until then, and each metric, as in
      `metrics.jsonl`. None where nothing has been measured yet.

    Raises:
      ConfigError: for another split.
    """
    splits = (TRAIN, VALIDATION, TEST)
    if split not in splits:
      raise ConfigError('split', split, f'one of {", ".join(map(repr, splits))}')
    records = [r for r in self.records() if r['split'] == split]
    names = dict.fromkeys(name for r in records for name in r if name != 'split')
    return Table({name: _column(records, name) for name in names})

  def records(self) -> list[Record]:
    """All that was measured, as it lies in `metrics.jsonl`."""
    return run_records.read_records(self._path)

  def plot(self, metric: str | None = None, beside: Sequence['Run'] = ()) -> Curves:
    """Draws losses over tokens.

    Args:
      metric: its name; None means bits per byte, or else nats.
      beside: more runs, for the same picture.

    Returns:
      A picture; the last line of a notebook's cell shows it.

    Raises:
      ConfigError: if a run has no metric of that name, or `beside` is no list of runs.
    """
    if isinstance(beside, str) or not all(isinstance(run, Run) for run in beside):
      raise ConfigError('beside', beside, "a list of runs, such as [Run('runs/other')]")
    runs = [self, *beside]
    same_name = len({run.model_dir.name for run in runs}) < len(runs)
    names = [str(run.model_dir) if same_name else run.model_dir.name for run in runs]
    records = {name: run.records() for name, run in zip(names, runs, strict=True)}
    return Curves(curves.of_runs(records, metric))


def _column(records: Sequence[Record], name: str) -> np.ndarray:
  return np.array([r.get(name, np.nan) for r in records])
