"""t5x/eval.py: exact bits per byte over a split, by SeqIO's metric and by the trainer's."""

import json
import os

import pytest

pytest.importorskip('t5x.eval', reason='T5X is not installed: evaluation with it')

import t5x_runs
from t5x_runs import STEPS

from tvq_t5x.checkpoints import layout
from tvq_t5x.standalone import run_records


@pytest.fixture(scope='module', params=[3, 16], ids=lambda size: f'batches_of_{size}')
def evaluated(request, trained, tmp_path_factory):
  """Folder of an evaluation, with batches that the split does not fill."""
  folder = tmp_path_factory.mktemp('eval')
  macros = {
    'CHECKPOINT_PATH': os.path.relpath(layout.folder(trained, STEPS)),
    'EVAL_OUTPUT_DIR': str(folder),
    'BATCH_SIZE': request.param,
  }
  files = ['gin/runs/eval.gin', t5x_runs.TINY_MODEL, 'gin/mesh/data_parallel.gin']
  t5x_runs.run('eval', 'evaluate', files, t5x_runs.bindings(**macros))
  return folder


@pytest.fixture(scope='module')
def expected(standalone):
  """What the runner found at its end, on the same split and with the same parameters."""
  records = run_records.read_records(standalone / 'metrics.jsonl')
  (record,) = (r for r in records if r['split'] == 'test')
  return record


def test_seqio_metric(evaluated, expected):
  (path,) = evaluated.glob('inference_eval/*metrics.jsonl')
  (line,) = path.read_text().splitlines()
  metrics = json.loads(line)
  for name in ('bits_per_byte', 'cross_entropy'):
    assert metrics[name] == pytest.approx(expected[name], rel=1e-6)


def test_metrics_of_training(evaluated, expected):
  found = t5x_runs.scalars(evaluated / 'training_eval' / 'tiny_bytes')
  for name in ('bits_per_byte', 'cross_entropy', 'accuracy', 'quantization_error/layer_0_1'):
    assert found[name] == {STEPS: pytest.approx(expected[name], rel=1e-5)}
