"""Metrics beside a run's own files: each step once, also after a kill, in tables and writers."""

import csv
import json
import pathlib
import shutil
import time

import numpy as np
import pytest
from clu import metric_writers
from util import one_device

from tvq_t5x import train
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.standalone import run_log, run_records
from tvq_t5x.training import writers

TINY = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
pytestmark = pytest.mark.usefixtures('cleared_gin')


class Collected(writers.ScalarWriter):
  """A user's writer."""

  made: list = []  # noqa: RUF012

  def __init__(self, model_dir, last_step):
    self.scalars, self.last_step, self.closed = {}, last_step, False
    Collected.made.append(self)

  def write_scalars(self, step, scalars):
    self.scalars.setdefault(step, {}).update(scalars)

  def close(self):
    self.closed = True


def table(folder, split):
  with (folder / 'csv' / f'{split}.csv').open(newline='') as f:
    return [{name: x for name, x in row.items() if x} for row in csv.DictReader(f)]


def records(folder, split):
  found = [r for r in run_records.read_records(folder / 'metrics.jsonl') if r['split'] == split]
  return [{name: str(x) for name, x in r.items() if name != 'split'} for r in found]


def run(folder, *bindings):
  settings = [
    'TRAIN_STEPS = 16',
    'EVAL_PERIOD = 8',
    'CHECKPOINT_PERIOD = 8',
    'SAMPLE_PERIOD = None',
  ]
  with one_device():
    return train.run([TINY], [*settings, f'MODEL_DIR = {str(folder)!r}', *bindings])


@pytest.mark.slow
def test_each_step_once_also_after_a_kill(tmp_path):
  folder = tmp_path / 'run'
  imports = ['from __gin__ import dynamic_registration', 'import test_writers', f"include '{TINY}'"]
  (tmp_path / 'own.gin').write_text(
    '\n'.join([*imports, "WRITERS = ['csv', @test_writers.Collected]"])
  )
  Collected.made.clear()
  bindings = [
    'TRAIN_STEPS = 16',
    'EVAL_PERIOD = 8',
    'CHECKPOINT_PERIOD = 8',
    'SAMPLE_PERIOD = None',
  ]
  with one_device():
    assert train.run([str(tmp_path / 'own.gin')], [*bindings, f'MODEL_DIR = {str(folder)!r}']) == 0
  whole = {split: table(folder, split) for split in ('train', 'validation', 'test')}
  for split, rows in whole.items():
    assert rows == records(folder, split) and rows
  (own,) = Collected.made
  assert own.closed and sorted(own.scalars) == [4, 8, 12, 16]
  assert {name.split('/')[0] for name in own.scalars[16]} == {'train', 'validation', 'test'}
  # As a kill leaves it: later steps than the checkpoint has, and half a row.
  shutil.rmtree(folder / 'checkpoint_16')
  path = folder / 'csv' / 'train.csv'
  path.write_text(path.read_text() + path.read_text().splitlines()[-1][:9])
  assert run(folder, "WRITERS = ['csv']") == 0
  for split, rows in whole.items():
    found = table(folder, split)
    assert [row['step'] for row in found] == [row['step'] for row in rows]
    same = [{k: x for k, x in row.items() if 'second' not in k} for row in found]
    assert same == [{k: x for k, x in row.items() if 'second' not in k} for row in rows]


class Everything(metric_writers.MetricWriter):
  """Notes all calls."""

  def __init__(self):
    self.calls = []

  def _note(self, kind):
    return lambda step, values, *rest: self.calls.append((kind, step, sorted(values)))


for _kind in ('summaries', 'scalars', 'images', 'videos', 'audios', 'texts', 'histograms'):
  setattr(Everything, f'write_{_kind}', lambda self, *args, _k=_kind: self._note(_k)(*args))
Everything.__abstractmethods__ = frozenset()


def test_writers_get_samples_pictures_and_histograms(tmp_path):
  writer = Everything()
  writer.flush = writer.close = lambda: None
  with run_log.RunLog(tmp_path, [lambda model_dir, last_step: writer]) as log:
    log.go_on_after(0)
    log.write('train', 4, {'loss': 1.5})
    log.write_samples(4, ['one', 'two'])
    log.write_histograms('validation', 4, {'code_usage/layer_0': np.ones(8)})
    log.write_picture('test', 4, 'curve', np.zeros([2, 3, 3], np.uint8))
    log.write_samples(8, np.zeros([1, 4, 4, 3], np.uint8))
  assert writer.calls == [
    ('scalars', 4, ['train/loss']),
    ('texts', 4, ['validation/sample/0', 'validation/sample/1']),
    ('histograms', 4, ['validation/code_usage/layer_0']),
    ('images', 4, ['test/curve']),
    ('images', 8, ['validation/samples']),
  ]


def test_a_table_gets_new_columns(tmp_path):
  writer = writers.CsvWriter(tmp_path, 0)
  writer.write_scalars(4, {'train/loss': 1.5})
  writer.write_scalars(8, {'train/loss': 1.25, 'train/other, "odd"': 2, 'test/loss': 3.0})
  writer.write_scalars(12, {'train/loss': 1.0})
  assert table(tmp_path, 'train') == [
    {'step': '4', 'loss': '1.5'},
    {'step': '8', 'loss': '1.25', 'other, "odd"': '2'},
    {'step': '12', 'loss': '1.0'},
  ]
  writers.CsvWriter(tmp_path, 8).write_scalars(12, {'train/loss': 0.5})
  assert [row['loss'] for row in table(tmp_path, 'train')] == ['1.5', '1.25', '0.5']
  assert table(tmp_path, 'test') == [{'step': '8', 'loss': '3.0'}]


@pytest.mark.parametrize('given', ["'csv'", "['cvs']", '[3]'])
def test_refusals(tmp_path, capsys, given):
  assert run(tmp_path / 'run', f'WRITERS = {given}') == 2
  message = capsys.readouterr().err
  assert 'train.writers = ' in message and 'WRITERS' in message
  assert "give a list of 'csv', 'wandb'" in message or 'accepts Sequence' in message
  assert not (tmp_path / 'run').exists()


def test_without_wandb(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'wandb', None)
  with pytest.raises(ConfigError, match="'wandb' is not installed: pip install wandb"):
    writers.make(['wandb'], tmp_path, 0)


def _wandb_records(path):
  """What lies in a run's file: LevelDB's format of logs, behind a header of 7 bytes."""
  data, place, parts = path.read_bytes(), 7, b''
  while place + 7 <= len(data):
    if (left := 32768 - place % 32768) < 7:
      place += left
      continue
    size, kind = int.from_bytes(data[place + 4 : place + 6], 'little'), data[place + 6]
    parts += data[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):  # All of a record, or its last part.
      yield parts
      parts = b''


def _values(history):
  """By their names; some versions tell the parts of a value one by one."""
  found = {}
  for item in history.item:
    *names, last = item.nested_key or [item.key]
    place = found
    for name in names:
      place = place.setdefault(name, {})
    place[last] = json.loads(item.value_json)
  return found


def test_wandb_offline(tmp_path, monkeypatch):
  """What is in the files that wandb leaves."""
  pytest.importorskip('wandb', reason='wandb is not installed: its writer')
  from wandb.proto import wandb_internal_pb2

  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  numbers, found = [], []
  for last_step in (0, 4):
    writer = writers.make(['wandb'], tmp_path, last_step)
    for step in (last_step + 4, last_step + 8):
      writer.write_scalars(step, {'train/loss': 1.0 / step})
      writer.write_scalars(step, {'test/loss': 2.0})
    writer.write_texts(last_step + 8, {'validation/sample/0': 'a < b'})
    writer.write_images(last_step + 8, {'validation/curve': np.zeros([8, 8, 3], np.uint8)})
    writer.write_histograms(last_step + 8, {'validation/code_usage/layer_0': np.arange(9.0)})
    writer.close()
    time.sleep(1)  # The names of wandb's folders have seconds.
    numbers.append((tmp_path / 'wandb_run').read_text())
  assert numbers[0] == numbers[1]
  for path in sorted(tmp_path.glob('wandb/offline-run-*/*.wandb')):
    assert numbers[0] in path.name
    for data in _wandb_records(path):
      record = wandb_internal_pb2.Record.FromString(data)
      if record.WhichOneof('record_type') == 'history':
        found.append(_values(record.history))
  shown = [x for x in found if x['_step'] == 12][-1]
  assert shown['validation/sample/0']['_type'] == 'html-file'
  assert shown['validation/curve']['_type'] == 'images/separated'
  assert sum(shown['validation/code_usage/layer_0']['values']) == 9
  (page,) = tmp_path.glob('wandb/offline-run-*/files/media/html/**/*_12_*.html')
  assert 'a &lt; b' in page.read_text()
  losses = [(x['_step'], x['train/loss'], x['test/loss']) for x in found]
  assert losses == [(4, 0.25, 2.0), (8, 0.125, 2.0), (8, 0.125, 2.0), (12, 1 / 12, 2.0)]
