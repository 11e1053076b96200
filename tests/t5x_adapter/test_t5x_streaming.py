"""CARRY_STATE in T5X: the state goes on from batch to batch, through both engines' checkpoints."""

import shutil

import numpy as np
import pytest

pytest.importorskip('t5x.train', reason='T5X is not installed: its runs that carry a state on')

import t5x_runs
from t5x_runs import assert_same_arrays

from tvq_t5x.checkpoints import layout

STEPS = 8
MACROS = {
  'CARRY_STATE': True,
  'TRAIN_STEPS': STEPS,
  'EVAL_PERIOD': STEPS,
  'CHECKPOINT_PERIOD': STEPS // 2,
}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('standalone') / 'run'
  t5x_runs.train_standalone(folder, **{'SAMPLE_PERIOD': STEPS, **MACROS})
  return folder


@pytest.mark.parametrize(
  ('shape', 'macros'), [((1, 1), {}), ((4, 2), {}), ((2, 2), {'SEQUENCE_PARTITIONS': 2})]
)
def test_it_is_that_of_the_runner(run, tmp_path, shape, macros):
  folder = tmp_path / 'run'
  t5x_runs.train(folder, shape=shape, **MACROS, **macros)
  assert_same_arrays(folder, run, STEPS)
  positions = t5x_runs.arrays(folder, STEPS)['flax_mutables/carried/position']
  assert np.all(positions > t5x_runs.arrays(folder, STEPS // 2)['flax_mutables/carried/position'])


def test_a_run_of_the_runner_goes_on(run, tmp_path):
  folder = shutil.copytree(run, tmp_path / 'run')
  shutil.rmtree(layout.folder(folder, STEPS))
  t5x_runs.train(folder, **MACROS)
  assert_same_arrays(folder, run, STEPS)
