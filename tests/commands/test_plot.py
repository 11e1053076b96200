"""Runs drawn beside each other, in the format of the file's name."""

import json
import math

import pytest

from tvq_t5x import plot
from tvq_t5x.common import plots

STARTS = {'.png': b'\x89PNG', '.pdf': b'%PDF', '.svg': b'<?xml'}


def write_run(folder, scale, **more):
  folder.mkdir()
  records = [
    {'step': i, 'split': split, 'tokens': 1000 * i, 'cross_entropy': scale / i, **more}
    for i in range(1, 5)
    for split in ('train', 'validation')
  ]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in records))
  return str(folder)


@pytest.mark.parametrize('ending', STARTS)
def test_runs_beside_each_other(tmp_path, ending):
  runs = [write_run(tmp_path / name, i + 1.0) for i, name in enumerate(('_a $x', 'b'))]
  output = tmp_path / f'curves{ending}'
  assert plot.run(runs, str(output)) == 0
  data = output.read_bytes()
  assert data.startswith(STARTS[ending])
  if ending == '.svg':
    text = data.decode()
    # Both runs, the last values of both, and the unit.
    for word in ('_a $x', '/b, validation 0.500', 'train 0.250', 'nats'):
      assert f'{word} ' in text or f'{word}' in text, word


def test_models_have_their_colors_and_others_have_what_is_left():
  found = plots.colors(['LongVQ', 'runs/a', 'quadratic', 'runs/b'])
  assert len(set(found.values())) == 4
  assert found['quadratic'] == plots.colors(['quadratic', 'LongVQ'])['quadratic']


def test_the_same_picture_is_the_same_file(tmp_path):
  run = write_run(tmp_path / 'a', 1.0)
  files = [tmp_path / f'{i}{ending}' for ending in STARTS for i in range(2)]
  for path in files:
    assert plot.run([run], str(path)) == 0
  assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files[::2], files[1::2], strict=True))
  assert (
    b'/TrueType' in (tmp_path / '0.pdf').read_bytes()
    or b'/CIDFontType2' in (tmp_path / '0.pdf').read_bytes()
  )  # Not Type 3, which conferences refuse.


def test_bits_where_all_have_them(tmp_path):
  runs = [write_run(tmp_path / 'a', 1.0, bits_per_byte=2.5)]
  assert plot.run(runs, str(tmp_path / 'a.svg')) == 0
  assert 'bits per byte' in (tmp_path / 'a.svg').read_text()
  runs.append(write_run(tmp_path / 'b', 1.0, bits_per_byte=math.nan, accuracy=0.5))
  (tmp_path / 'b' / 'metrics.jsonl').write_text(
    (tmp_path / 'b' / 'metrics.jsonl').read_text().replace('bits_per_byte', 'bits')
  )
  assert plot.run(runs, str(tmp_path / 'b.svg')) == 0
  assert 'nats' in (tmp_path / 'b.svg').read_text()


@pytest.mark.parametrize(
  ('runs', 'output', 'metric', 'words'),
  [
    ([], 'x.png', None, 'no run was given'),
    (['a'], 'x.jpg', None, '--output=x.jpg: give a file that ends in .png or .pdf or .svg'),
    (['none'], 'x.png', None, 'none is no folder of a run'),
    (['a'], 'no/folder/x.png', None, '--output=no/folder/x.png: there is no folder'),
    (['a'], 'x.png', 'loss', "a has no metric 'loss', but cross_entropy"),
  ],
)
def test_refusals(tmp_path, monkeypatch, capsys, runs, output, metric, words):
  monkeypatch.chdir(tmp_path)
  write_run(tmp_path / 'a', 1.0)
  assert plot.run(runs, output, metric) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / output).exists()
