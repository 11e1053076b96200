"""The run that gin files describe, under the names that they have for its settings."""

import dataclasses
import os
import pathlib
import shutil

import pytest
from util import one_device

from tvq_t5x.checkpoints import layout
from tvq_t5x.common.errors import CheckpointError, ConfigError
from tvq_t5x.gin_support import parsing
from tvq_t5x.standalone import configuration
from tvq_t5x.standalone.run_records import TEST, VALIDATION
from tvq_t5x.standalone.run_settings import RunSettings

_TINY = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
_IMPORTS = 'from __gin__ import dynamic_registration\nfrom tvq_t5x.standalone import runner\n'
pytestmark = pytest.mark.usefixtures('cleared_gin')


def test_every_setting_is_bound_as_one_of_runner_train(tmp_path):
  parsing.parse_gin([_TINY], ["MODEL_DIR = 'runs/x'"])
  written = parsing.config_str()
  names = {field.name for field in dataclasses.fields(RunSettings)} - {'initial_checkpoint'}
  assert {name for name in names if f'\nrunner.train.{name} = ' in written} == names
  # As a command reads what a run has left.
  (tmp_path / 'config.gin').write_text(written)
  parsing.parse_gin([str(tmp_path / 'config.gin')], ["runner.train.initial_checkpoint = 'y'"])
  assert configuration.setting('model_dir') == 'runs/x'
  assert configuration.setting('initial_checkpoint') == 'y'


def test_settings_are_built():
  bindings = ["MODEL_DIR = 'runs/x'", 'runner.train.sample_cfg = None', 'BATCH_SIZE = 16']
  parsing.parse_gin([_TINY], bindings)
  settings = configuration.run_settings()
  assert (settings.model_dir, settings.sample_cfg) == ('runs/x', None)
  assert (settings.batch_size, settings.length) == (16, 64)
  assert (settings.updates, settings.update_tokens) == (2, 32)
  assert settings.evaluated.keys() == {VALIDATION, TEST}
  assert settings.evaluated[TEST].split == 'test'
  assert len(settings.dataset_cfgs) == 3
  assert settings.periods == {
    'log_period': 4,
    'eval_period': 20,
    'sample_period': 20,
    'checkpoint_period': 4,
  }


def _parse(tmp_path, *lines):
  path = tmp_path / 'run.gin'
  path.write_text(_IMPORTS + '\n'.join(lines))
  parsing.parse_gin([str(path)], [])


_COMPLETE = [
  f'runner.train.{f.name} = None'
  for f in dataclasses.fields(RunSettings)
  if f.default is dataclasses.MISSING and f.type not in (int, str)
] + ["runner.train.model_dir = 'x'", 'runner.train.total_steps = 1', 'runner.train.random_seed = 0']


def test_settings_that_gin_leaves_open_have_their_defaults(tmp_path):
  _parse(tmp_path, *_COMPLETE)
  assert configuration.setting('update_len') is None
  assert configuration.setting('num_microbatches') == 1
  assert configuration.setting('random_seed') == 0


def test_a_run_without_all_that_it_needs_is_refused(tmp_path):
  _parse(tmp_path, *[line for line in _COMPLETE if 'total_steps' not in line])
  for ask in (configuration.run_settings, lambda: configuration.setting('random_seed')):
    with pytest.raises(ConfigError, match=r'without train\.total_steps: include .*pretrain\.gin'):
      ask()


def test_a_misspelled_setting_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='did you mean total_steps'):
    _parse(tmp_path, 'runner.train.total_step = 1')


def _last(folder, remove):
  """Makes the newest checkpoint one that can't be read."""
  newest = layout.find(str(folder), 'x')
  shutil.rmtree(newest / 'state') if remove else os.truncate(newest / 'state/manifest.ocdbt', 0)
  return newest


@pytest.mark.parametrize('remove', [False, True])
def test_the_newest_checkpoint_that_can_be_read_is_taken(tiny_run, tmp_path, caplog, remove):
  folder = shutil.copytree(tiny_run, tmp_path / 'run')
  newest = _last(folder, remove)
  with one_device():
    configured = configuration.configure(str(folder), modules=['tiny_task'])
    loaded = configured.restore()
    assert (loaded.step, loaded.checkpoint.name) == (8, 'checkpoint_8')
    if not remove:
      assert str(newest) in caplog.text and 'checkpoint_8 is taken instead' in caplog.text
      with pytest.raises(CheckpointError, match='checkpoint_16 can not be read'):
        configuration.load(str(newest), modules=['tiny_task'])


def test_a_run_that_goes_on_meanwhile_is_read_at_its_newest(tiny_run, tmp_path):
  folder = shutil.copytree(tiny_run, tmp_path / 'run')
  shutil.move(folder / 'checkpoint_16', tmp_path / 'next')
  with one_device():
    configured = configuration.configure(str(folder), modules=['tiny_task'])
    shutil.move(tmp_path / 'next', folder / 'checkpoint_16')
    shutil.rmtree(folder / 'checkpoint_8')
    assert configured.restore().step == 16


def test_a_folder_without_arrays_is_no_checkpoint(tmp_path):
  (tmp_path / 'checkpoint_7' / 'dataset').mkdir(parents=True)
  with pytest.raises(ConfigError, match='there is no checkpoint in it'):
    layout.find(str(tmp_path), '--checkpoint=x')
