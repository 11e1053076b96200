"""WRITERS of T5X's trainer, without T5X: what they get, in which order, and what is refused."""

import concurrent.futures

import jax
import pytest

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.t5x_adapter.more_writers import MoreWriters

pytestmark = pytest.mark.quick


def future(value):
  found = concurrent.futures.Future()
  found.set_result(value)
  return found


def table(folder, split):
  return (folder / 'csv' / f'{split}.csv').read_text().splitlines()


def test_metrics_reach_them_when_they_are_there(tmp_path):
  pending = concurrent.futures.Future()
  more = MoreWriters(['csv'], str(tmp_path), 0)
  more.trained(2, pending)
  assert not (tmp_path / 'csv').exists()  # Nobody waits for what is being computed.
  pending.set_result({'loss': 1.5})
  more.trained(4, future({'loss': 1.25}))
  assert table(tmp_path, 'train') == ['step,loss', '2,1.5']
  more.evaluated(4, {'task': {'loss': 2.0}})
  assert table(tmp_path, 'train')[1:] == ['2,1.5', '4,1.25']
  assert table(tmp_path, 'validation') == ['step,loss', '4,2.0']
  more.trained(6, future({'loss': 1.0}))
  more.close()
  # A run that goes on after step 4 writes the next ones again.
  more = MoreWriters(['csv'], str(tmp_path), 4)
  more.trained(6, future({'loss': 0.5}))
  more.close()
  assert table(tmp_path, 'train')[1:] == ['2,1.5', '4,1.25', '6,0.5']


def test_several_tasks_stand_apart(tmp_path):
  more = MoreWriters(['csv'], str(tmp_path), 0)
  more.evaluated(2, {'a': {'loss': 1.0}, 'b': {'loss': 2.0}})
  assert table(tmp_path, 'validation') == ['step,a/loss,b/loss', '2,1.0,', '2,,2.0']


def test_one_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  more = MoreWriters(['csv'], str(tmp_path), 0)
  more.trained(2, concurrent.futures.Future())  # Which it does not wait for.
  more.close()
  assert not (tmp_path / 'csv').exists()


def test_a_bucket_is_refused():
  with pytest.raises(ConfigError, match='checked_trainer.writers.* a MODEL_DIR on a disk'):
    MoreWriters(['csv'], 'gs://bucket/run', 0)
  MoreWriters([], 'gs://bucket/run', 0).close()
