"""An interrupted T5X run, started again, ends like one that was not interrupted."""

import os
import shutil

import pytest

pytest.importorskip('t5x.train', reason='T5X is not installed: going on with its runs')

import t5x_runs
from t5x_runs import STEPS, assert_same_arrays

from tvq_t5x.checkpoints import layout


@pytest.fixture
def interrupted(trained, tmp_path):
  """A run of which only the checkpoints before the last one are left, and a half of the last."""
  folder = shutil.copytree(trained, tmp_path / 'run')
  last = layout.folder(folder, STEPS)
  last.rename(last.with_name(f'{last.name}.orbax-checkpoint-tmp-1'))
  return folder


def test_it_ends_with_the_same_bits(interrupted, trained):
  """Parameters, codebooks, moments, the order of the data, and thereby the metrics."""
  step, _ = t5x_runs.train(os.path.relpath(interrupted))
  assert step == STEPS
  assert_same_arrays(interrupted, trained, tolerance=0)
  found, expected = (t5x_runs.scalars(folder / 'train') for folder in (interrupted, trained))
  for name in ('loss', 'codebook_perplexity/layer_0_0', 'learning_rate'):
    assert found[name] == expected[name]
  # What the interrupted save had left.
  assert not any('tmp' in path.name for path in interrupted.iterdir())


def test_it_starts_again_from_its_first_checkpoint(trained, tmp_path):
  """Which T5X saves when it has read a batch ahead: that batch is not lost."""
  folder = shutil.copytree(trained, tmp_path / 'run')
  for step in (STEPS // 2, STEPS):
    shutil.rmtree(layout.folder(folder, step))
  t5x_runs.train(folder)
  assert_same_arrays(folder, trained, tolerance=0)


def test_a_finished_run_is_left_alone(trained, tmp_path):
  folder = shutil.copytree(trained, tmp_path / 'run')
  step, state = t5x_runs.train(folder)
  assert step == int(state.step) == STEPS
  assert layout.steps_in(folder) == layout.steps_in(trained)


def test_other_data_in_the_run_does_not_go_unnoticed(interrupted, trained):
  """The position of the data counts: without it, the same ten steps end elsewhere."""
  settings = ['utils.SaveCheckpointConfig.save_dataset = False']
  t5x_runs.train(interrupted, *settings)
  with pytest.raises(AssertionError):
    assert_same_arrays(interrupted, trained, tolerance=1e-3)
