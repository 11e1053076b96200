"""A classifier in T5X's programs: the numbers of the runner, on meshes and hosts."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip('t5x.train', reason='T5X is not installed: a classifier in it')

import t5x_runs
import tiny_classes
from t5x_runs import STEPS, assert_same_arrays
from test_t5x_multihost import SCRIPT, Hosts
from util import one_device

from tvq_t5x.checkpoints import layout
from tvq_t5x.data import datasets
from tvq_t5x.standalone import configuration, run_records

TINY = str(t5x_runs.ROOT / 'tests' / 'tiny_classifier.gin')
MODEL = str(t5x_runs.ROOT / 'tests' / 'tiny_classifier_model.gin')


@pytest.fixture(scope='module')
def in_t5x(tmp_path_factory):
  folder = tmp_path_factory.mktemp('classifier') / 't5x'
  t5x_runs.train(folder, files=[TINY])
  return folder


@pytest.fixture(scope='module')
def standalone(tmp_path_factory):
  folder = tmp_path_factory.mktemp('classifier') / 'standalone'
  macros = {**t5x_runs.SHORT, 'MODEL_DIR': str(folder)}
  with one_device():
    assert t5x_runs.standalone.run([TINY], t5x_runs.bindings(**macros)) == 0
  return folder


def test_it_trains_as_in_the_runner(in_t5x, standalone):
  assert_same_arrays(in_t5x, standalone)
  (record,) = (
    r
    for r in run_records.read_records(standalone / 'metrics.jsonl')
    if r['split'] == 'validation' and r['step'] == STEPS
  )
  found = t5x_runs.scalars(in_t5x / 'training_eval' / 'tiny_classes')
  for name in ('accuracy', 'cross_entropy'):
    assert found[name][STEPS] == pytest.approx(record[name], rel=1e-5)


def test_it_trains_as_in_the_runner_on_a_mesh(standalone, tmp_path):
  t5x_runs.train(tmp_path / 'run', files=[TINY], shape=(2, 2), NUM_MICROBATCHES=2)
  assert_same_arrays(tmp_path / 'run', standalone, tolerance=1e-4)


def test_two_hosts_train_as_one(in_t5x, tmp_path):
  with Hosts(SCRIPT, 2, tmp_path, files=(TINY,)) as hosts:
    hosts.finish()
  assert_same_arrays(tmp_path / 'run', in_t5x)


@pytest.mark.parametrize('batch_size', [3, 16])
def test_it_is_evaluated(in_t5x, standalone, tmp_path, batch_size):
  macros = {
    'CHECKPOINT_PATH': str(layout.folder(in_t5x, STEPS)),
    'EVAL_OUTPUT_DIR': str(tmp_path),
    'BATCH_SIZE': batch_size,
  }
  files = ['gin/runs/eval.gin', MODEL, 'gin/mesh/data_parallel.gin']
  t5x_runs.run('eval', 'evaluate', files, t5x_runs.bindings(**macros))
  records = run_records.read_records(standalone / 'metrics.jsonl')
  (expected,) = (r for r in records if r['split'] == 'test')
  (path,) = tmp_path.glob('inference_eval/*metrics.jsonl')
  metrics = json.loads(path.read_text())
  of_training = t5x_runs.scalars(tmp_path / 'training_eval' / 'tiny_classes')
  for name in ('accuracy', 'cross_entropy'):
    assert metrics[name] == pytest.approx(expected[name], rel=1e-5)
    assert of_training[name] == {STEPS: pytest.approx(expected[name], rel=1e-5)}


@pytest.mark.parametrize('mode', ['predict', 'predict_with_aux', 'score'])
def test_it_infers(in_t5x, tmp_path, mode):
  macros = {
    'CHECKPOINT_PATH': str(layout.folder(in_t5x, STEPS)),
    'INFER_OUTPUT_DIR': str(tmp_path),
    'BATCH_SIZE': 3,
  }
  files = ['gin/runs/infer_classes.gin', MODEL, 'gin/mesh/data_parallel.gin']
  settings = [*t5x_runs.bindings(**macros), f'infer_script.infer.mode = {mode!r}']
  t5x_runs.run('infer', 'infer', files, settings)
  (path,) = tmp_path.glob(f'tiny_classes-{mode}.jsonl-00000-of-00001')
  records = [json.loads(line) for line in path.read_text().splitlines()]
  labels = [[example.label] for example in tiny_classes.examples('test')]
  assert [r['inputs']['label'] for r in records] == labels
  with one_device():
    loaded = configuration.load(str(layout.folder(in_t5x, STEPS)), [TINY])
    cfg = configuration.run_settings().evaluated['test']
    (batch,) = datasets.evaluation_batches(
      datasets.dataclasses.replace(cfg, batch_size=len(labels)), loaded.model.FEATURE_CONVERTER_CLS
    )
    scores, aux = jax.jit(loaded.model.score_batch)(loaded.params, batch)
  found = np.asarray(aux['log_probabilities'])
  if mode == 'score':
    np.testing.assert_allclose([r['score'] for r in records], scores, rtol=1e-4)
  else:
    assert [r['prediction'] for r in records] == np.argmax(found, axis=1)[:, None].tolist()
  if mode != 'predict':
    written = [r['aux']['log_probabilities'] for r in records]
    np.testing.assert_allclose(written, found, rtol=1e-4)
