"""Sizes and durations in words, and text for a terminal."""

import unicodedata
from collections.abc import Sequence


def size(num_bytes: float) -> str:
  """Bytes in words, such as '1.5 MB'."""
  for unit in ('bytes', 'kB', 'MB', 'GB'):
    if num_bytes < 1000:
      return f'{num_bytes:.3g} {unit}'
    num_bytes /= 1000
  return f'{num_bytes:.3g} TB'


def duration(seconds: float) -> str:
  """Seconds in words, such as '3m 20s'."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m {seconds % 60:02d}s'
  return f'{seconds // 3600}h {seconds % 3600 // 60:02d}m'


def printable(text: str) -> str:
  """Text for a terminal: what controls it, lines and tabs apart, is shown as its code."""
  return ''.join(
    c if c in '\n\t' or unicodedata.category(c) not in ('Cc', 'Cs') else repr(c)[1:-1] for c in text
  )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Rows as lines, whose cells lie below each other."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]
