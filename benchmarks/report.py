"""What a benchmark leaves: a record of its results, and a plot of speed and memory."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
from absl import flags

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402


class Line(NamedTuple):
  """A line of a plot: the values at some sizes."""

  sizes: Sequence[int]
  values: Sequence[float]


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


def plot(path: str, xlabel: str, panels: Mapping[str, Mapping[str, Line]]) -> None:
  """Draws panels side by side, by title, with a line for each variant; all axes logarithmic."""
  figure, axes = plt.subplots(1, len(panels), figsize=(10, 4), constrained_layout=True)
  for axis, (title, lines) in zip(axes, panels.items(), strict=True):
    for variant, line in lines.items():
      axis.plot(line.sizes, line.values, 'o-', label=variant)
    axis.set(yscale='log', xlabel=xlabel, title=title)
    axis.set_xscale('log', base=2)
    axis.grid(alpha=0.3)
  axes[0].legend()
  figure.savefig(path, dpi=120)
