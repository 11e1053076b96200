"""Training runs that benchmarks compare: each a process of `python -m tvq_t5x.train`.

What is finished is not run again, and what was interrupted goes on. SIGTERM and Ctrl-C reach the
run, which saves itself first.
"""

import dataclasses
import json
import math
import pathlib
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tvq_t5x.checkpoints import layout

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Model:
  """What is compared: gin files after those of the run, and settings."""

  name: str
  files: tuple[str, ...] = ()
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


LONGVQ = ('gin/models/longvq.gin',)
_CONFIG = 'config.TransformerConfig'
QUADRATIC = Model('quadratic', (), {f'{_CONFIG}.attention_type': 'quadratic'})
TRANSFORMER_VQ = Model('Transformer-VQ')


@dataclasses.dataclass(frozen=True)
class Run:
  """A model in a folder; `steps` are those of the whole run."""

  model: Model
  folder: pathlib.Path
  steps: int
  files: tuple[str, ...]
  settings: Mapping[str, Any]

  def records(self, split: str) -> list[dict[str, Any]]:
    """What it has written so far of a split, in the order of steps."""
    path = self.folder / 'metrics.jsonl'
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    return [r for r in map(json.loads, lines) if r['split'] == split]

  @property
  def result(self) -> dict[str, Any] | None:
    """The last record of the test split, if the run is finished."""
    return next((r for r in self.records('test') if r['step'] == self.steps), None)

  @property
  def step(self) -> int:
    """How far it is."""
    return max((r['step'] for r in self.records('train')), default=0)

  @property
  def num_params(self) -> int | None:
    """Of the last checkpoint."""
    steps = layout.steps_in(self.folder) if self.folder.exists() else []
    if not steps:
      return None
    arrays = layout.read_metadata(layout.folder(self.folder, steps[-1]))['arrays']
    return sum(math.prod(shape) for k, (shape, _) in arrays.items() if k.startswith('params/'))

  @property
  def tokens_per_second(self) -> float | None:
    """Median of the log's, less the first, which compiles."""
    speeds = [r['tokens_per_second'] for r in self.records('train')[1:]]
    return statistics.median(speeds) if speeds else None

  def finish(self) -> None:
    """Runs it to its end.

    Raises:
      SystemExit: if it fails or is interrupted.
    """
    settings = {'MODEL_DIR': str(self.folder), 'TRAIN_STEPS': self.steps}
    settings |= {**self.settings, **self.model.settings}
    command = [sys.executable, '-m', 'tvq_t5x.train']
    command += [f'--gin_file={file}' for file in (*self.files, *self.model.files)]
    command += [f'--gin.{name}={value!r}' for name, value in settings.items()]
    self.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f'{self.folder}.log', 'a', encoding='utf-8') as log:
      # In a session of its own, so that a signal comes once: from here.
      process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
      handlers = {
        s: signal.signal(s, lambda number, _: process.send_signal(number))
        for s in (signal.SIGTERM, signal.SIGINT)
      }
      code = process.wait()
    for number, handler in handlers.items():
      signal.signal(number, handler)
    if code:
      print(f'{self.folder.name}: exit code {code}, see {log.name}', flush=True)
      raise SystemExit(code)


def of_kjv(out: str, model: Model, steps: int, seed: int) -> Run:
  """A run of gin/kjv_tiny.gin in the folder `out`, with its schedule scaled to so many steps."""
  name = f'{model.name.lower().replace(" ", "_")}_{steps}_{seed}'
  settings = {
    'RANDOM_SEED': seed,
    'WARMUP_STEPS': min(100, steps // 8),
    'EVAL_PERIOD': max(4, steps // 16 * 4),
    'SAMPLE_PERIOD': steps,
    'CHECKPOINT_PERIOD': max(4, steps // 32 * 4),
    'samples.SampleConfig.length': 1,
  }
  folder = pathlib.Path(out).absolute() / name
  return Run(model, folder, steps, ('gin/kjv_tiny.gin',), settings)


def of_seeds(out: str, models: Iterable[Model], steps: int, num_seeds: int) -> dict[str, list[Run]]:
  """`of_kjv` of each seed, by the models' names."""
  return {m.name: [of_kjv(out, m, steps, seed) for seed in range(num_seeds)] for m in models}


def finish_seeds(found: Mapping[str, Sequence[Run]], metric: str) -> None:
  """`finish_all` of all, seed after seed, so that what there is can be compared."""
  finish_all((run for of_seed in zip(*found.values(), strict=True) for run in of_seed), metric)


def finish_all(runs: Iterable[Run], metric: str) -> None:
  """Runs what is not finished, in this order, and prints each result."""
  for run in runs:
    if run.result is None:
      print(f'{run.folder.name}: from step {run.step} of {run.steps}', flush=True)
      run.finish()
    print(f'{run.folder.name}: {metric} {run.result[metric]:.4f} on the test split', flush=True)


def cell(runs: Sequence[Run], metric: str, digits: int = 3) -> str:
  """The mean over finished runs, their range, and what isn't finished."""
  values = [run.result[metric] for run in runs if run.result]
  left = [f'{run.step:,} of {run.steps:,} steps' for run in runs if not run.result and run.step]
  not_begun = sum(not run.result and not run.step for run in runs)
  parts = []
  if values:
    parts.append(f'{statistics.mean(values):.{digits}f}')
    if len(values) > 1:
      parts.append(f'({min(values):.{digits}f} to {max(values):.{digits}f})')
  unfinished = [*left, *([f'{not_begun} not begun'] if not_begun else [])]
  if unfinished:
    parts.append(f'[unfinished: {"; ".join(unfinished)}]')
  return ' '.join(parts)


def write_part(path: pathlib.Path, name: str, text: str) -> None:
  """Puts text into a page, between `<!-- NAME -->` and `<!-- end of NAME -->`."""
  begin, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
  page = path.read_text(encoding='utf-8') if path.exists() else f'{begin}\n{end}\n'
  before, _, rest = page.partition(begin)
  _, _, after = rest.partition(end)
  path.write_text(f'{before}{begin}\n\n{text.strip()}\n\n{end}{after}', encoding='utf-8')
