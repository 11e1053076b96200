"""Mixers besides VQ attention in T5X: they train and carry their states as in the runner."""

import pytest

pytest.importorskip('t5x.train', reason="T5X is not installed: a user's own mixer in it")

import t5x_runs
from t5x_runs import assert_same_arrays
from test_own_mixer import MACROS, gin_file

TRAIN_STEPS = MACROS['TRAIN_STEPS']


@pytest.mark.parametrize('shape', [(1, 1), (2, 2)])
@pytest.mark.parametrize('mixer', ['own', 'longvq'])
def test_it_trains_as_in_the_runner(tmp_path, mixer, shape):
  files = [gin_file(tmp_path)]
  if mixer == 'longvq':
    files = [t5x_runs.TINY, str(t5x_runs.ROOT / 'gin' / 'models' / 'longvq.gin')]
  t5x_runs.train(tmp_path / 'run', shape=shape, files=files, **MACROS)
  macros = {'SAMPLE_PERIOD': TRAIN_STEPS, **MACROS}
  t5x_runs.train_standalone(tmp_path / 'standalone', files=files, **macros)
  assert_same_arrays(tmp_path / 'run', tmp_path / 'standalone', TRAIN_STEPS)
  carried = [n for n in t5x_runs.arrays(tmp_path / 'run', TRAIN_STEPS) if 'carried' in n]
  first = {'own': 'layers/0', 'longvq': 'layers/0/ssm'}[mixer]
  assert f'flax_mutables/carried/{first}' in carried
