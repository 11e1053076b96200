"""The command that generates ListOps: the same bytes for one seed, whole files or none."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from data_util import ODD_NAME

from tvq_t5x import make_listops
from tvq_t5x.data import listops

NAMES = ['basic_test.tsv', 'basic_train.tsv', 'basic_val.tsv']
SMALL = listops.Settings(min_length=5, max_length=40)
SIZES = {'train': 150, 'val': 20, 'test': 10}


def run(folder, sizes=SIZES, settings=SMALL, **kwargs):
  return make_listops.run(str(folder), sizes, settings, **kwargs)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def contents(folder):
  assert names(folder) == NAMES
  return [(folder / name).read_bytes() for name in NAMES]


def rows(data):
  header, *lines, end = data.split(b'\r\n')
  assert header == b'Source\tTarget' and not end
  return [line.split(b'\t') for line in lines]


def test_one_seed_gives_the_same_bytes_with_any_number_of_processes(tmp_path):
  assert run(tmp_path / 'one') == 0
  assert run(tmp_path / 'two', num_processes=2) == 0
  assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
  assert run(tmp_path / 'other', settings=listops.Settings(5, 40, seed=1)) == 0
  assert contents(tmp_path / 'one') != contents(tmp_path / 'other')


def test_files(tmp_path):
  assert run(tmp_path / ODD_NAME) == 0
  test, train, val = map(rows, contents(tmp_path / ODD_NAME))
  assert list(map(len, (train, val, test))) == list(SIZES.values())
  texts = [text for text, _ in (*train, *val, *test)]
  assert len(set(texts)) == len(texts)  # Across splits, too.
  assert {len(value) for _, value in train} == {1}
  expected = listops.expressions(SMALL)
  for text, value in (*train, *val, *test):
    expression = next(expected)
    assert (text, value) == (expression.text.encode(), str(expression.value).encode())


def test_nothing_is_overwritten(tmp_path, capfd):
  (tmp_path / 'basic_val.tsv').write_text('mine')
  assert run(tmp_path) == 2
  assert 'has basic_val.tsv already' in capfd.readouterr().err
  assert names(tmp_path) == ['basic_val.tsv'] and (tmp_path / NAMES[2]).read_text() == 'mine'


@pytest.mark.parametrize(
  ('folder', 'sizes', 'settings', 'words'),
  [
    ('', SIZES, SMALL, '--output_dir has to be given'),
    ('no/where', SIZES, SMALL, 'there is no folder'),
    ('file', SIZES, SMALL, 'is a file: give a folder'),
    ('out', SIZES, listops.Settings(9, 8), '--min_length=9 is more than --max_length=8'),
    ('out', dict.fromkeys(SIZES, 0), SMALL, '--num_train.*one that is not 0'),
    ('out', SIZES, listops.Settings(2, 3), 'hardly any'),
  ],
)
def test_refusals(tmp_path, monkeypatch, capfd, folder, sizes, settings, words):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').touch()
  assert run(folder, sizes, settings) == 2
  message = capfd.readouterr().err.replace('\n', ' ')
  assert message.startswith('error: ')
  assert re.search(words, message)
  assert names(tmp_path) == ['file']


def command(folder, *args):
  root = pathlib.Path(__file__).parents[2]
  return subprocess.Popen(
    [sys.executable, '-m', 'tvq_t5x.make_listops', f'--output_dir={folder}', *args],
    cwd=root,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


@pytest.mark.parametrize(
  ('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=['SIGINT', 'SIGTERM']
)
def test_an_interruption_leaves_nothing(tmp_path, interruptible, number, code):
  folder = tmp_path / 'out'
  with command(folder, '--num_processes=2') as process:
    while not list(folder.glob('*.incomplete')):
      assert process.poll() is None
      time.sleep(0.01)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, told = process.communicate()
  assert process.returncode == code
  assert 'Traceback' not in told
  assert not folder.exists()


@pytest.mark.parametrize(
  ('args', 'code', 'words'),
  [
    (['--help'], 0, '--num_processes'),
    (['--max_args=1'], 2, 'max_args'),
    (['--min_length=9', '--max_length=8'], 2, 'error: --min_length=9 is more than'),
  ],
)
def test_flags(tmp_path, args, code, words):
  with command(tmp_path / 'out', *args) as process:
    shown, told = process.communicate()
  assert process.returncode == code
  assert words in shown + told
  assert not (tmp_path / 'out').exists()
