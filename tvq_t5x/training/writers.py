"""Where a run's metrics go besides its own files: CSV, Weights & Biases, or a writer of the user's.

`WRITERS` names them. A writer is a `clu.metric_writers.MetricWriter`, and what makes it is called
with the run's folder and the step that the run goes on after: what was written of later steps will
come again. Names are `SPLIT/NAME`. The standalone runner writes metrics as scalars, samples as
texts or images, the curve as an image and the usage of codes as histograms; T5X the metrics.
"""

import csv
import html
import io
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from clu import metric_writers

from tvq_t5x.common import files
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import parsing

Writer = metric_writers.MetricWriter
Factory = Callable[[pathlib.Path, int], Writer]
_STEP = 'step'


class ScalarWriter(Writer):
  """A writer that leaves out all that is no number."""

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Writes metrics, named `SPLIT/METRIC`."""
    raise NotImplementedError

  def write_summaries(self, step: int, values: Any, metadata: Any = None) -> None:
    """Does nothing."""

  def write_images(self, step: int, images: Any) -> None:
    """Does nothing."""

  def write_videos(self, step: int, videos: Any) -> None:
    """Does nothing."""

  def write_audios(self, step: int, audios: Any, *, sample_rate: int) -> None:
    """Does nothing."""

  def write_texts(self, step: int, texts: Any) -> None:
    """Does nothing."""

  def write_histograms(self, step: int, arrays: Any, num_buckets: Any = None) -> None:
    """Does nothing."""

  def write_pointcloud(self, step: int, **kwargs: Any) -> None:
    """Does nothing."""

  def write_hparams(self, hparams: Any) -> None:
    """Does nothing."""

  def flush(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


class CsvWriter(ScalarWriter):
  """Tables `csv/SPLIT.csv` in the run's folder: a row for each step, a column for each metric."""

  def __init__(self, model_dir: pathlib.Path, last_step: int):
    """Drops what was written of later steps, and a row that a kill has cut short."""
    self._folder = model_dir / 'csv'
    self._columns: dict[pathlib.Path, list[str]] = {}
    for path in self._folder.glob('*.csv'):
      self._replace(path, [row for row in _rows(path) if int(row[_STEP]) <= last_step])

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """See the base class."""
    for split, metrics in _by_split(scalars).items():
      path = self._folder / f'{split}.csv'
      row = {_STEP: step, **metrics}
      if not set(row) <= set(self._columns.get(path, ())):
        self._folder.mkdir(exist_ok=True)
        self._replace(path, [*_rows(path), row])
        continue
      with path.open('a', encoding='utf-8', newline='') as f:
        f.write(_csv(self._columns[path], [row]))

  def _replace(self, path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    self._columns[path] = columns = list(dict.fromkeys(name for row in rows for name in row))
    with files.replacing(path) as f:
      f.write((_csv(columns, [dict(zip(columns, columns, strict=True))]) if rows else '').encode())
      f.write(_csv(columns, rows).encode())


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
  text = io.StringIO()
  csv.DictWriter(text, columns, restval='', lineterminator='\n').writerows(rows)
  return text.getvalue()


def _rows(path: pathlib.Path) -> list[dict[str, str]]:
  """The rows of a table that are whole."""
  text = path.read_text(encoding='utf-8') if path.exists() else ''
  return list(csv.DictReader(io.StringIO(text[: text.rfind('\n') + 1])))


def _by_split(scalars: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  found: dict[str, dict[str, Any]] = {}
  for name, value in scalars.items():
    split, _, metric = name.partition('/')
    found.setdefault(split, {})[metric] = value
  return found


class WandbWriter(ScalarWriter):
  """Weights & Biases. What it needs (project, mode, ...) is in its own environment variables.

  A run that is continued is the same run there; steps that it has already are not taken twice.
  """

  def __init__(self, model_dir: pathlib.Path, last_step: int):
    """Starts the run, or continues it.

    Raises:
      ConfigError: if wandb is not installed, or refuses.
    """
    del last_step  # wandb takes no step that is not later than its last one.
    try:
      import wandb  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as e:
      raise ConfigError("WRITERS: 'wandb' is not installed: pip install wandb.") from e
    self._wandb = wandb
    saved = model_dir / 'wandb_run'
    number = saved.read_text(encoding='utf-8') if saved.exists() else secrets.token_hex(4)
    try:
      self._run = wandb.init(
        dir=str(model_dir),
        id=number,
        resume='allow',
        project=os.environ.get('WANDB_PROJECT', 'tvq_t5x'),
        name=os.environ.get('WANDB_NAME', model_dir.name),
        config={'gin': parsing.config_str()},
      )
    except wandb.errors.Error as e:
      raise ConfigError(f'WRITERS: wandb: {e}') from e
    saved.write_text(number, encoding='utf-8')

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """See the base class."""
    self._run.log({name: np.asarray(x).item() for name, x in scalars.items()}, step=step)

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """See the base class; arrays are [height, width, channels], or several of them."""
    shown = {name: x[None] if x.ndim == 3 else x for name, x in images.items()}
    make = self._wandb.Image
    self._run.log({name: [make(image) for image in x] for name, x in shown.items()}, step=step)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """See the base class; texts are shown as they are."""
    quoted = {name: f'<pre>{html.escape(text)}</pre>' for name, text in texts.items()}
    self._run.log({name: self._wandb.Html(x) for name, x in quoted.items()}, step=step)

  def write_histograms(self, step: int, arrays: Mapping[str, Any], num_buckets: Any = None) -> None:
    """See the base class; wandb chooses the buckets."""
    self._run.log({name: self._wandb.Histogram(x) for name, x in arrays.items()}, step=step)

  def close(self) -> None:
    """Ends the run."""
    self._run.finish()


_NAMED: dict[str, Factory] = {'csv': CsvWriter, 'wandb': WandbWriter}


def check(given: Any, setting: str = 'train.writers') -> None:
  """Refuses what is no list of writers.

  Args:
    given: for WRITERS.
    setting: its name, for the message.

  Raises:
    ConfigError: naming what is accepted.
  """
  accepted = "a list of 'csv', 'wandb', and references to writers of yours, such as @my.Writer"
  if not isinstance(given, list | tuple):
    raise ConfigError(setting, given, accepted)
  for one in given:
    if not callable(one) and one not in _NAMED:
      raise ConfigError(setting, given, accepted)


def make(given: Sequence[Any], model_dir: pathlib.Path, last_step: int) -> Writer:
  """All of them as one.

  Args:
    given: that `check` accepts.
    model_dir: of the run.
    last_step: that the run goes on after.
  """
  factories = [_NAMED[one] if isinstance(one, str) else one for one in given]
  return metric_writers.MultiWriter([factory(model_dir, last_step) for factory in factories])
