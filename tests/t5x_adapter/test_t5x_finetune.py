"""Training from a checkpoint of another run: with its codebooks, without, with a new optimizer."""

import os

import numpy as np
import pytest

pytest.importorskip('t5x.train', reason='T5X is not installed: fine-tuning with it')

import t5x_runs
from t5x_runs import STEPS
from util import one_device

from tvq_t5x import convert
from tvq_t5x.checkpoints import layout

_FROM_SCRATCH = 'utils.RestoreCheckpointConfig.fallback_to_scratch = True'


def finetune(trained, folder, *settings, **macros):
  macros = {
    'INITIAL_CHECKPOINT_PATH': os.path.relpath(layout.folder(trained, STEPS)),
    'TRAIN_STEPS': STEPS + 4,
    'CHECKPOINT_PERIOD': 4,
    'EVAL_PERIOD': 4,
    'LEARNING_RATE': 1e-3,
    **macros,
  }
  return t5x_runs.train(folder, *settings, files=[t5x_runs.TINY, 'gin/runs/finetune.gin'], **macros)


def _dropped(pattern):
  return f'utils.RestoreCheckpointConfig.assignment_map = [({pattern!r}, None)]'


def test_it_starts_from_all_of_the_checkpoint(trained, tmp_path):
  folder = tmp_path / 'run'
  assert finetune(trained, folder)[0] == STEPS + 4
  before, after = (t5x_runs.arrays(folder, step) for step in (STEPS, STEPS + 4))
  source = t5x_runs.arrays(trained, STEPS)
  for name, x in before.items():
    np.testing.assert_array_equal(x, source[name], err_msg=name)
    if name.startswith('target/'):
      assert np.any(x != after[name]), name
  rates = t5x_runs.scalars(folder / 'train')['learning_rate']
  assert rates == {STEPS + 2: pytest.approx(1e-3), STEPS + 4: pytest.approx(1e-3)}


def test_codebooks_can_be_left_behind(trained, tmp_path):
  folder = tmp_path / 'run'
  finetune(trained, folder, _dropped('target/.*quantizer.*'), _FROM_SCRATCH)
  found, old = t5x_runs.arrays(folder, STEPS), t5x_runs.arrays(trained, STEPS)
  new = t5x_runs.arrays(trained, 0)  # Of the same seed.
  for name, x in found.items():
    expected = new if 'quantizer' in name else old
    np.testing.assert_array_equal(x, expected[name], err_msg=name)
  # They take part in training from there on.
  name = 'target/layers/attention_0/quantizer/c_sum'
  assert np.max(np.abs(t5x_runs.arrays(folder, STEPS + 4)[name] - new[name])) > 1e-4


def test_the_optimizer_can_be_left_behind(trained, tmp_path):
  folder = tmp_path / 'run'
  step, _ = finetune(trained, folder, _dropped('state/.*'), _FROM_SCRATCH, TRAIN_STEPS=4)
  assert step == 4  # The steps are counted anew.
  found, old = t5x_runs.arrays(folder, 0), t5x_runs.arrays(trained, STEPS)
  for name, x in found.items():
    np.testing.assert_array_equal(x, old[name] if 'target/' in name else 0, err_msg=name)


def test_it_starts_from_a_checkpoint_that_was_exported(trained, tmp_path):
  exported, back = tmp_path / 'exported', tmp_path / 'back'
  gin_files, bindings = [t5x_runs.TINY], t5x_runs.bindings(**t5x_runs.SHORT)
  with one_device():
    options = convert.Options(checkpoint=str(trained), output=str(exported))
    assert convert.run(options, gin_files, bindings) == 0
    options = convert.Options(folder=str(exported), output=str(back))
    assert convert.run(options, modules=['tiny_task']) == 0
  source, found = t5x_runs.arrays(trained, STEPS), t5x_runs.arrays(back, STEPS)
  assert {k: np.shape(x) for k, x in found.items()} == {k: np.shape(x) for k, x in source.items()}
  for name, x in found.items():
    if name.startswith('target/') or name == 'state/step':
      np.testing.assert_array_equal(x, source[name], err_msg=name)
  assert finetune(back, tmp_path / 'run')[0] == STEPS + 4
