"""What a run tells: lines in the log, TensorBoard, and records that survive restarts."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from clu import metric_writers

from tvq_t5x.common import files, images, words
from tvq_t5x.standalone import event_files
from tvq_t5x.standalone.run_records import LOSS, RECORDS, VALIDATION, Record, read_records
from tvq_t5x.training import writers

_EVENTS, _SAMPLES = 'tensorboard', 'samples'  # Folders.
_FIRST = ('loss', 'cross_entropy', 'bits_per_byte', 'accuracy', 'learning_rate')


class _Events(metric_writers.SummaryWriter):
  """TensorBoard's files."""

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """See the base class."""
    # Indented by four, text is verbatim in Markdown.
    quoted = {name: '    ' + text.replace('\n', '\n    ') for name, text in texts.items()}
    super().write_texts(step, quoted)


class RunLog:
  """The metrics and samples of a run.

  `metrics.jsonl` has one record for each step and split; TensorBoard, and the writers that the run
  is given, get all that is written, with `clu.metric_writers`' own functions.
  """

  def __init__(self, model_dir: pathlib.Path, more_writers: Sequence[Any] = ()):
    """Reads what the run has written so far.

    Args:
      model_dir: folder of the run.
      more_writers: that get all of it too, see `writers`.
    """
    self._dir = model_dir
    self._path = model_dir / RECORDS
    self._records = read_records(self._path)
    self._writers: dict[str, _Events] = {}
    self._given, self._more = more_writers, writers.make((), model_dir, 0)

  def go_on_after(self, last_step: int) -> None:
    """Drops records, events and samples after a step, since the run writes them again."""
    self._records = [r for r in self._records if r['step'] <= last_step]
    with files.replacing(self._path) as f:
      f.write(''.join(map(files.json_line, self._records)).encode())
    event_files.drop_after(self._dir / _EVENTS, last_step)
    samples = self._dir / _SAMPLES
    # What a link leads to is not this run's to remove.
    for path in [] if samples.is_symlink() else samples.glob('*'):
      if path.stem.isdecimal() and int(path.stem) > last_step:
        path.unlink()

    self._more = writers.make(self._given, self._dir, last_step)

  def __enter__(self) -> 'RunLog':
    return self

  def __exit__(self, *unused: Any) -> None:
    for writer in (*self._writers.values(), self._more):
      writer.close()

  def write(
    self, split: str, step: int, metrics: Mapping[str, float], where: str = '', **extra: Any
  ) -> None:
    """Writes the metrics of a step.

    Args:
      split: what they were measured on.
      step: parameter updates so far.
      metrics: values by name.
      where: begins the line in the log.
      **extra: more values, which get into all but the line.
    """
    record = {'step': step, 'split': split, **extra, **metrics}
    self._records.append(record)
    with self._path.open('a', encoding='utf-8') as f:
      f.write(files.json_line(record))
    self._show('scalars', split, step, {**extra, **metrics})
    logging.info('%s%s', where, _summary(metrics))

  def write_histograms(self, split: str, step: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Shows how numbers are distributed; they get into no record."""
    self._show('histograms', split, step, arrays)

  def write_picture(self, split: str, step: int, name: str, picture: np.ndarray) -> None:
    """Shows a picture [height, width, 3] uint8; it gets into no record."""
    self._show('images', split, step, {name: picture[None]})

  def _show(self, kind: str, split: str, step: int, values: Mapping[str, Any]) -> None:
    """Writes values of a kind of `clu.metric_writers` to TensorBoard and the given writers."""
    writer = self._writer(split)
    getattr(writer, f'write_{kind}')(step, values)
    writer.flush()
    getattr(self._more, f'write_{kind}')(step, {f'{split}/{k}': x for k, x in values.items()})
    self._more.flush()

  def write_samples(self, step: int, samples: Sequence[str] | np.ndarray) -> None:
    """Writes samples, texts or images [N, height, width, 3] uint8, to a file, and shows them."""
    path = self._samples(step)
    path.parent.mkdir(exist_ok=True)
    if isinstance(samples, np.ndarray):
      path = path.with_suffix('.png')
      images.write_grid(path, samples)
      self._show('images', VALIDATION, step, {'samples': samples})
      logging.info('Samples after step %d are in %s.', step, path)
    else:
      self._write_texts(step, samples, path)

  def _write_texts(self, step: int, texts: Sequence[str], path: pathlib.Path) -> None:
    rule = '-' * 80
    content = f'\n{rule}\n'.join(texts)
    path.write_text(f'{content}\n', encoding='utf-8')
    self._show('texts', VALIDATION, step, {f'sample/{i}': text for i, text in enumerate(texts)})
    shown = words.printable(content)
    logging.info('Samples after step %d:\n%s\n%s\n%s', step, rule, shown, rule)

  def has_samples(self, step: int) -> bool:
    """Whether the samples of a step have been written."""
    path = self._samples(step)
    return path.exists() or path.with_suffix('.png').exists()

  def record(self, split: str, step: int) -> Record | None:
    """The record of a step, if there is one."""
    found = [r for r in self._records if r['split'] == split and r['step'] == step]
    return found[-1] if found else None

  def best_step(self) -> int | None:
    """The step with the lowest validation loss."""
    records = [r for r in self._records if r['split'] == VALIDATION]
    scored = [(r[LOSS], r['step']) for r in records if not math.isnan(r.get(LOSS, math.nan))]
    return min(scored)[1] if scored else None

  def records(self) -> list[Record]:
    """All records, in the order in which they were written."""
    return list(self._records)

  def _samples(self, step: int) -> pathlib.Path:
    return self._dir / _SAMPLES / f'{step:08d}.txt'

  def _writer(self, split: str) -> _Events:
    if split not in self._writers:
      folder = self._dir / _EVENTS / split
      self._writers[split] = _Events(str(folder))
    return self._writers[split]


def _summary(metrics: Mapping[str, float]) -> str:
  """The metrics as text, those of layers as their mean and range."""
  groups: dict[str, list[float]] = {}
  for name, value in metrics.items():
    groups.setdefault(name.split('/')[0], []).append(value)
  names = sorted(groups, key=lambda n: (_FIRST.index(n) if n in _FIRST else len(_FIRST), n))
  return ', '.join(f'{name} {_values(groups[name])}' for name in names)


def _values(values: Sequence[float]) -> str:
  if len(values) == 1:
    return f'{values[0]:.4g}'
  return f'{sum(values) / len(values):.4g} ({min(values):.4g} to {max(values):.4g})'
