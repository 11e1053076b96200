"""How pictures of numbers look: a thing has the same color in all, and papers get PDF files."""

import io
import logging as std_logging
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tvq_t5x.common import files

# What a file may end in.
FORMATS = ('.png', '.pdf', '.svg')
# The models that are compared, in every picture. Colors of Okabe and Ito, which do without telling
# red from green.
_COLORS = {
  'Transformer-VQ': '#0072B2',
  'quadratic': '#D55E00',
  'LongVQ': '#009E73',
  'SSM only': '#CC79A7',
}
_OTHERS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7', '#56B4E9', '#D55E00', '#000000')
_DPI = 120
# Text in PDF files as TrueType: conferences refuse the other kind that matplotlib has.
_PDF = {'pdf.fonttype': 42}


def colors(names: Sequence[str]) -> dict[str, str]:
  """A color for each thing: its own, if it is one of the models that are compared."""
  left = [color for color in _OTHERS if color not in {_COLORS.get(name) for name in names}]
  others = [name for name in dict.fromkeys(names) if name not in _COLORS]
  found = {name: left[i % len(left)] for i, name in enumerate(others)}
  return {name: _COLORS.get(name) or found[name] for name in names}


def figure(width: float, height: float, caption: str = '') -> Any:
  """An empty `matplotlib.figure.Figure`, of inches, with small text below what will be drawn.

  It belongs to no window and no notebook, and no state of `pyplot` changes.

  Raises:
    OSError: if matplotlib finds no folder for its list of fonts.
  """
  # Not at import: most of what imports this draws nothing, and matplotlib takes its time.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  empty = Figure(figsize=(width, height), layout='constrained')
  FigureCanvasAgg(empty)
  if caption:
    empty.supxlabel(caption, fontsize='x-small', color='0.35', x=0.01, ha='left')
  return empty


def png(drawn: Any) -> bytes:
  """A figure as the bytes of a PNG file."""
  data = io.BytesIO()
  drawn.savefig(data, format='png', dpi=_DPI)
  return data.getvalue()


def pixels(drawn: Any) -> np.ndarray:
  """A figure as [height, width, 3] uint8."""
  drawn.set_dpi(_DPI)
  drawn.canvas.draw()
  return np.array(drawn.canvas.buffer_rgba())[..., :3]


def save(drawn: Any, path: pathlib.Path) -> None:
  """Writes a figure in the format that the path ends in; replaces the file at once."""
  from matplotlib import rc_context

  # The same picture is the same file, whenever it was drawn.
  std_logging.getLogger('fontTools').setLevel(std_logging.WARNING)  # Of fonts in a PDF.
  metadata = {'.pdf': {'CreationDate': None}, '.svg': {'Date': None}}.get(path.suffix)
  with rc_context({**_PDF, 'svg.hashsalt': 'tvq_t5x'}), files.replacing(path) as f:
    drawn.savefig(f, format=path.suffix[1:], dpi=_DPI, metadata=metadata)


def save_both(drawn: Any, path: pathlib.Path) -> None:
  """Writes a figure to `path`, a PNG file, and to a PDF file of the same name beside it."""
  save(drawn, path)
  save(drawn, path.with_suffix('.pdf'))
