"""Draws the tables of docs/speed.md: `throughput` and `sampling` there, as PNG and PDF.

python benchmarks/speed_pictures.py
"""

import pathlib
from collections.abc import Iterator

import report
from report import Line

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
_SIZES = 'batch 1, float32, D = 256, 2 layers, S = 512, L = M = 512'
_MACHINE = 'two cores of an Intel Xeon, JAX 0.10.2'


def rows(page: str, first_column: str) -> Iterator[list[str]]:
  """The cells of the table whose first column has this name, without those above the line."""
  _, _, table = page.partition(f'| {first_column} |')
  for line in table.splitlines()[2:]:
    if not line.startswith('|'):
      return
    yield [cell.strip() for cell in line.strip('|').split('|')]


def panels(page: str, first_column: str, titles: tuple[str, str]) -> dict[str, dict[str, Line]]:
  """Speed, the third column, and memory, the last one, of each variant by size."""
  found: tuple[dict[str, Line], ...] = ({}, {})
  for size, variant, speed, _, memory in rows(page, first_column):
    for lines, value in zip(found, (speed, memory), strict=True):
      line = lines.setdefault(report.name_of(variant), Line([], []))
      if value[0].isdigit():  # Or it does not fit.
        line.sizes.append(_number(size))
        line.values.append(_number(value))
  return dict(zip(titles, found, strict=True))


def _number(cell: str) -> float:
  return float(cell.replace(',', ''))


def main() -> None:
  page = (DOCS / 'speed.md').read_text(encoding='utf-8')
  pictures = (
    ('throughput', 'T', 'sequence length T', 'training, tokens/s', "step's temporaries, GB"),
    ('sampling', 'tokens before', 'tokens before', 'sampling, tokens/s', 'memory, MB'),
  )
  for name, column, xlabel, *titles in pictures:
    drawn = panels(page, column, tuple(titles))
    what = 'A training step' if name == 'throughput' else '256 tokens, nucleus 0.9'
    report.plot(DOCS / f'{name}.png', xlabel, drawn, f'{what}, {_SIZES}; {_MACHINE}')


if __name__ == '__main__':
  main()
