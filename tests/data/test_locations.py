"""Where data lies: gin, environment and --data_dir, in this order; what messages say of them."""

import os
import pathlib

import gin
import pytest
from absl import flags

from tvq_t5x import train
from tvq_t5x.commands import command_line
from tvq_t5x.common.errors import ConfigError
from tvq_t5x.data import locations
from tvq_t5x.gin_support import parsing

pytestmark = pytest.mark.usefixtures('cleared_gin')


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
  for name in ('ENWIK8_PATH', 'TVQ_DATA_DIR'):
    monkeypatch.setenv(name, '')


def test_the_order(monkeypatch, tmp_path):
  assert locations.data_path('ENWIK8_PATH', None) is None
  with locations.data_dir(str(tmp_path)), locations.data_dir(None):
    assert locations.data_path('ENWIK8_PATH', None) == str(tmp_path)
    assert locations.path('ENWIK8_PATH', None) is None
    monkeypatch.setenv('ENWIK8_PATH', '~/variable')
    assert locations.data_path('ENWIK8_PATH', None) == os.path.expanduser('~/variable')
    assert locations.data_path('ENWIK8_PATH', 'gin') == 'gin'


def test_a_relative_folder_stays_the_same_one(monkeypatch, tmp_path):
  (tmp_path / 'data').mkdir()
  monkeypatch.chdir(tmp_path)
  with locations.data_dir('data'):
    monkeypatch.chdir('/')
    assert locations.data_path('ENWIK8_PATH', None) == str(tmp_path / 'data')
  with locations.data_dir('gs://bucket/tfds'):
    assert locations.data_path('ENWIK8_PATH', None) == 'gs://bucket/tfds'
  assert locations.data_path('ENWIK8_PATH', None) is None


def test_a_folder_that_is_not_there(tmp_path):
  (tmp_path / 'file').write_text('')
  for folder in ('', 'no/folder', str(tmp_path / 'file' / 'x')):
    with pytest.raises(ConfigError, match=f'^--data_dir={folder}: there is no such folder'):
      with locations.data_dir(folder):
        pass


def test_training_looks_there(tmp_path, capsys):
  run_file, bindings = 'gin/enwik8_base.gin', ["MODEL_DIR = ''", 'BATCH_SIZE = 8']
  assert train.run([run_file], bindings, data_dir=str(tmp_path)) == 2
  message = capsys.readouterr().err
  assert f'there is no enwik8 and no enwik8.zip in {str(tmp_path)!r}' in message
  assert '--gin.ENWIK8_PATH=' in message and '--data_dir=FOLDER' in message
  assert len(message.splitlines()) == 1
  assert train.run([run_file], bindings, data_dir=str(tmp_path / 'no')) == 2
  assert capsys.readouterr().err.startswith('error: --data_dir=')


def test_a_folder_in_which_nothing_is_looked_for(monkeypatch, tmp_path):
  with locations.data_dir(str(tmp_path)):
    locations.path('SENTENCEPIECE_MODEL', None)
    locations.data_path('ENWIK8_PATH', 'gin')
    monkeypatch.setenv('PG19_PATH', 'variable')
    locations.data_path('PG19_PATH', None)
    with pytest.raises(ConfigError, match=f'^--data_dir={tmp_path}: the data does not come from'):
      locations.check_data_dir()
    locations.data_path('ENWIK8_PATH', None)
    locations.check_data_dir()
  # The environment is not a flag: it may serve other commands.
  monkeypatch.setenv('TVQ_DATA_DIR', str(tmp_path))
  with locations.data_dir(None):
    locations.check_data_dir()


def test_training_on_a_task_that_reads_no_folder(tmp_path, capsys):
  tiny = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
  bindings = [f"MODEL_DIR = '{tmp_path}/run'"]
  for dry_run in (True, False):
    assert train.run([tiny], bindings, data_dir=str(tmp_path), dry_run=dry_run) == 2
    message = capsys.readouterr().err
    assert message.startswith(f'error: --data_dir={tmp_path}: ') and 'leave it out' in message
  assert not (tmp_path / 'run').exists()


def test_a_path_of_a_flag_may_begin_with_the_home_folder(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  values = flags.FlagValues()
  command_line.define_data_flag(values)
  command_line.define_path_flag('json', None, 'A file.', values)
  command_line.define_path_list_flag('input', 'Files.', values)
  values(['command', '--data_dir=~/data', '--json=-', '--input=~/a', '--input=b'])
  assert (values.data_dir, values.json) == ('/home/me/data', '-')
  assert values.input == ['/home/me/a', 'b']


def test_messages_name_the_ways_that_work():
  assert locations.how_to_set('ENWIK8_PATH') == 'the environment variable ENWIK8_PATH'
  gin.parse_config_file(f'{parsing.gin_root()}/tasks/enwik8.gin')
  assert locations.how_to_set('ENWIK8_PATH') == (
    '--gin.ENWIK8_PATH=\\"...\\" or the environment variable ENWIK8_PATH'
  )
  assert locations.how_to_set_data('ENWIK8_PATH') == (
    '--gin.ENWIK8_PATH=\\"...\\", the environment variable ENWIK8_PATH or --data_dir=FOLDER (in '
    'T5X, TVQ_DATA_DIR)'
  )
