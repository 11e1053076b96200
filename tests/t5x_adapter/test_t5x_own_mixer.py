"""A mixer of a user's own in T5X: it trains and carries its state as in the runner."""

import pytest

pytest.importorskip('t5x.train', reason="T5X is not installed: a user's own mixer in it")

import t5x_runs
from t5x_runs import assert_same_arrays
from test_own_mixer import MACROS, gin_file

TRAIN_STEPS = MACROS['TRAIN_STEPS']


@pytest.mark.parametrize('shape', [(1, 1), (2, 2)])
def test_it_trains_as_in_the_runner(tmp_path, shape):
  file = gin_file(tmp_path)
  t5x_runs.train(tmp_path / 'run', shape=shape, files=[file], **MACROS)
  macros = {'SAMPLE_PERIOD': TRAIN_STEPS, **MACROS}
  t5x_runs.train_standalone(tmp_path / 'standalone', files=[file], **macros)
  assert_same_arrays(tmp_path / 'run', tmp_path / 'standalone', TRAIN_STEPS)
  assert 'flax_mutables/carried/layers/0' in t5x_runs.arrays(tmp_path / 'run', TRAIN_STEPS)
