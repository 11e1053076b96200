"""Checkpoints move between T5X and the standalone runner, in one layout."""

import shutil

import pytest

pytest.importorskip('t5x.train', reason='T5X is not installed: its checkpoints')

import numpy as np
import t5x_runs
from t5x_runs import STEPS, assert_same_arrays

from tvq_t5x.checkpoints import layout
from tvq_t5x.standalone import run_records


def cut(source, folder):
  """A copy of a run as it was after half of its steps."""
  shutil.copytree(source, folder)
  shutil.rmtree(layout.folder(folder, STEPS))
  return folder


def losses_of_runner(folder):
  records = run_records.read_records(folder / 'metrics.jsonl')
  return {r['step']: r['loss'] for r in records if r['split'] == 'train'}


def test_the_layout_is_the_documented_one(trained, standalone):
  ours, theirs = (t5x_runs.arrays(folder, STEPS) for folder in (standalone, trained))
  assert {k: np.shape(x) for k, x in ours.items()} == {k: np.shape(x) for k, x in theirs.items()}
  names = {'target/token_embedder/embedding', 'target/layers/attention_0/quantizer/c_sum'}
  assert names | {'state/step'} <= ours.keys()
  assert any(name.startswith('state/param_states/') for name in ours)
  for folder in (trained, standalone):
    checkpoint = layout.folder(folder, STEPS)
    assert (checkpoint / 'state' / 'manifest.ocdbt').exists()
    assert (checkpoint / 'dataset' / 'train_ds-000-of-001.index').exists()
  assert (layout.folder(standalone, STEPS) / 'metadata').exists()


def test_the_runner_goes_on_where_t5x_stopped(trained, standalone, tmp_path):
  folder = cut(trained, tmp_path / 'run')
  t5x_runs.train_standalone(folder)
  losses = losses_of_runner(folder)
  expected = t5x_runs.scalars(trained / 'train')['loss']
  assert sorted(losses) == list(range(STEPS // 2 + 2, STEPS + 1, 2))
  for step, loss in losses.items():
    assert loss == pytest.approx(expected[step], rel=1e-5)
  assert_same_arrays(folder, standalone)


def test_t5x_goes_on_where_the_runner_stopped(trained, standalone, tmp_path):
  folder = cut(standalone, tmp_path / 'run')
  t5x_runs.train(folder)
  losses, expected = t5x_runs.scalars(folder / 'train')['loss'], losses_of_runner(standalone)
  assert sorted(losses) == list(range(STEPS // 2 + 2, STEPS + 1, 2))
  for step, loss in losses.items():
    assert loss == pytest.approx(expected[step], rel=1e-5)
  assert_same_arrays(folder, trained)
