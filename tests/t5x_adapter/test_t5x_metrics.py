"""What T5X's metric managers write for TensorBoard."""

import math

import pytest

pytest.importorskip('t5x.train', reason='T5X is not installed: its metrics')

import t5x_runs
from t5x_runs import STEPS

from tvq_t5x.standalone import run_records

HEALTH = {
  f'{name}/layer_0_{i}'
  for name in ('codebook_perplexity', 'codebook_dead_codes', 'quantization_error')
  for i in (0, 1)
}
OF_TOKENS = {'cross_entropy', 'bits_per_byte', 'accuracy', 'commit_loss'}


def test_training_metrics(trained):
  found = t5x_runs.scalars(trained / 'train')
  names = OF_TOKENS | HEALTH | {'loss', 'gradient_norm', 'learning_rate'}
  for name in names | {'timing/steps_per_second', 'timing/tokens_per_second'}:
    assert sorted(found[name]) == list(range(2, STEPS + 1, 2)), name
    assert all(map(math.isfinite, found[name].values())), name
  for step, steps_per_second in found['timing/steps_per_second'].items():
    tokens_per_second = found['timing/tokens_per_second'][step]
    assert tokens_per_second == pytest.approx(8 * 32 * steps_per_second, rel=1e-5)


def test_evaluation_metrics_are_those_of_the_runner(trained, standalone):
  """Every token counts once, though the last batch is not full."""
  records = run_records.read_records(standalone / 'metrics.jsonl')
  (expected,) = (r for r in records if r['split'] == 'validation')
  found = t5x_runs.scalars(trained / 'training_eval' / 'tiny_bytes')
  for name in OF_TOKENS | HEALTH:
    assert found[name] == {STEPS: pytest.approx(expected[name], rel=1e-5)}, name
