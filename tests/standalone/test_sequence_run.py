"""A run whose devices share sequences ends with the numbers of one whose devices share batches."""

import json
import pathlib

import jax
import orbax.checkpoint as ocp
import pytest
from mesh_util import assert_same_numbers, by_name, on_host

from tvq_t5x import evaluate, train
from tvq_t5x.checkpoints import layout
from tvq_t5x.standalone import run_log

_GIN = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
pytestmark = [
  pytest.mark.usefixtures('cleared_gin'),
  pytest.mark.skipif(
    len(jax.devices('cpu')) < 8, reason='XLA_FLAGS is set in the environment, without 8 CPU devices'
  ),
]


def run(folder, **macros):
  macros = {
    'MODEL_DIR': str(folder),
    'TRAIN_STEPS': 8,
    'EVAL_PERIOD': 8,
    'SAMPLE_PERIOD': 8,
    'CHECKPOINT_PERIOD': 8,
    **macros,
  }
  return train.run([_GIN], [f'{name} = {value!r}' for name, value in macros.items()])


def numbers(folder):
  """Parameters and moments at the end, and metrics."""
  state = ocp.StandardCheckpointer().restore(layout.folder(folder, 8) / layout.STATE)
  records = [
    {k: v for k, v in r.items() if isinstance(v, float) and k != 'tokens_per_second'}
    for r in run_log.read_records(folder / 'metrics.jsonl')
  ]
  return on_host(by_name({'state': state, 'records': records}))


@pytest.mark.slow
def test_it_ends_with_the_same_numbers(tmp_path, capsys):
  whole, shared = tmp_path / 'whole', tmp_path / 'shared'
  assert run(whole) == 0
  assert run(shared, SEQUENCE_PARTITIONS=4) == 0
  assert_same_numbers(numbers(shared), numbers(whole), 1e-4)
  samples = [(folder / 'samples' / '00000008.txt').read_text() for folder in (whole, shared)]
  assert samples[0] == samples[1]
  capsys.readouterr()
  # By the run's own configuration, which says that devices share sequences.
  args = {'checkpoint': str(shared), 'split': 'test', 'json_file': '-', 'modules': ['tiny_task']}
  assert evaluate.run([], **args) == 0
  found = json.loads(capsys.readouterr().out)
  expected = run_log.read_records(whole / 'metrics.jsonl')
  expected = next(r for r in expected if r['split'] == 'test')
  assert found['cross_entropy'] == pytest.approx(expected['cross_entropy'], rel=1e-4)
