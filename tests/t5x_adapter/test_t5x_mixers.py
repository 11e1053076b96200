"""Mixers besides VQ attention in T5X: they train and carry their states as in the runner."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip('t5x.train', reason="T5X is not installed: a user's own mixer in it")

import t5x_runs
from t5x_runs import assert_same_arrays
from test_own_mixer import MACROS, gin_file
from test_t5x_infer import batch_of
from util import one_device

from tvq_t5x.checkpoints import layout
from tvq_t5x.standalone import configuration, run_log

TRAIN_STEPS = MACROS['TRAIN_STEPS']
LONGVQ = str(t5x_runs.ROOT / 'gin' / 'models' / 'longvq.gin')


def _assert_trains_alike(folder, files, shape, carried):
  t5x_runs.train(folder / 'run', shape=shape, files=files, **MACROS)
  macros = {'SAMPLE_PERIOD': TRAIN_STEPS, **MACROS}
  t5x_runs.train_standalone(folder / 'standalone', files=files, **macros)
  assert_same_arrays(folder / 'run', folder / 'standalone', TRAIN_STEPS)
  names = t5x_runs.arrays(folder / 'run', TRAIN_STEPS)
  assert f'flax_mutables/carried/layers/0{carried}' in names


@pytest.mark.parametrize('shape', [(1, 1), (2, 2)])
def test_an_own_one_trains_as_in_the_runner(tmp_path, shape):
  _assert_trains_alike(tmp_path, [gin_file(tmp_path)], shape, '')


def test_longvq_trains_on_a_mesh_as_in_the_runner(tmp_path):
  _assert_trains_alike(tmp_path, [t5x_runs.TINY, LONGVQ], (2, 2), '/ssm')


@pytest.fixture(scope='module')
def longvq(tmp_path_factory):
  """Folder of the runs of both engines on one device."""
  folder = tmp_path_factory.mktemp('longvq')
  _assert_trains_alike(folder, [t5x_runs.TINY, LONGVQ], (1, 1), '/ssm')
  return folder


def _program(longvq, program, function, files, **macros):
  macros = {
    'CHECKPOINT_PATH': str(layout.folder(longvq / 'run', TRAIN_STEPS)),
    'BATCH_SIZE': 3,
    **macros,
  }
  mode = ["infer_script.infer.mode = 'score'"] if program == 'infer' else []
  files = [*files, t5x_runs.TINY_MODEL, LONGVQ, 'gin/mesh/data_parallel.gin']
  t5x_runs.run(program, function, files, [*t5x_runs.bindings(**macros), *mode])


def test_longvq_is_evaluated_as_in_the_runner(longvq, tmp_path):
  _program(longvq, 'eval', 'evaluate', ['gin/runs/eval.gin'], EVAL_OUTPUT_DIR=str(tmp_path))
  (path,) = tmp_path.glob('inference_eval/*metrics.jsonl')
  metrics = json.loads(path.read_text())
  records = run_log.read_records(longvq / 'standalone' / 'metrics.jsonl')
  (expected,) = (r for r in records if r['split'] == 'test')
  for name in ('bits_per_byte', 'cross_entropy'):
    assert metrics[name] == pytest.approx(expected[name], rel=1e-5)


def test_longvq_scores_in_inference(longvq, tmp_path):
  macros = {'INFER_OUTPUT_DIR': str(tmp_path), 'MIXTURE_OR_TASK_NAME': 'tiny_bytes'}
  _program(longvq, 'infer', 'infer', ['gin/runs/infer.gin'], **macros)
  (path,) = tmp_path.glob('tiny_bytes-score.jsonl-00000-of-00001')
  found = [json.loads(line) for line in path.read_text().splitlines()]
  with one_device():
    path = str(layout.folder(longvq / 'run', TRAIN_STEPS))
    loaded = configuration.load(path, [t5x_runs.TINY, LONGVQ])
  expected, _ = jax.jit(loaded.model.score_batch)(loaded.params, batch_of('tiny_bytes'))
  np.testing.assert_allclose([record['score'] for record in found], expected, rtol=1e-5)
