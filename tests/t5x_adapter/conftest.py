"""Runs that the tests of several of T5X's programs look at. Nothing here imports T5X by itself."""

import gin
import pytest


@pytest.fixture(autouse=True)
def _clear():
  yield
  gin.clear_config()


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """MODEL_DIR of an undisturbed T5X run on one device, with checkpoints 0, 10 and 20."""
  import t5x_runs

  folder = tmp_path_factory.mktemp('t5x') / 'run'
  t5x_runs.train(folder)
  return folder


@pytest.fixture(scope='session')
def standalone(tmp_path_factory):
  """MODEL_DIR of the standalone runner's run with the same settings."""
  import t5x_runs

  folder = tmp_path_factory.mktemp('standalone') / 'run'
  t5x_runs.train_standalone(folder)
  return folder


@pytest.fixture(scope='session')
def adamw_reference():
  """A few updates of the small model with AdamW, without T5X."""
  import small_runs

  return small_runs.Reference(small_runs.make_model('adamw'))
