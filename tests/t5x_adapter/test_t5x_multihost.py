"""Several hosts train to the numbers of one with the same global batch, dropout included."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip('t5x.train', reason='T5X is not installed: training on several hosts')

import t5x_runs
from t5x import train as t5x_train
from t5x_runs import STEPS, assert_same_arrays

from tvq_t5x.checkpoints import layout

MODULE = ['-m', 't5x.train']
SCRIPT = [t5x_train.__file__]


class Hosts:
  """Processes of one run, each with as many devices; a context that leaves none of them behind."""

  def __init__(self, program, count, folder, files=(t5x_runs.TINY,), devices=1, **macros):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      address = f'localhost:{s.getsockname()[1]}'
    paths = [str(t5x_runs.ROOT / 'tests'), os.environ.get('PYTHONPATH', '')]
    self._environment = {
      **os.environ,
      'PYTHONPATH': os.pathsep.join(paths),
      'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8', f'device_count={devices}'),
    }
    macros = {**t5x_runs.SHORT, 'MODEL_DIR': str(folder / 'run'), **macros}
    self._command = [
      sys.executable,
      *program,
      *(f'--gin_file={file}' for file in files),
      *(f'--gin.{name}={value!r}' for name, value in macros.items()),
      '--multiprocess_gpu',
      f'--coordinator_address={address}',
      f'--process_count={count}',
    ]
    self._logs = [folder / f'host_{i}.log' for i in range(count)]

  def __enter__(self):
    self.processes = []
    for i, path in enumerate(self._logs):
      with path.open('w') as log:
        self.processes.append(
          subprocess.Popen(
            [*self._command, f'--process_index={i}'],
            cwd=t5x_runs.ROOT,
            env=self._environment,
            stdout=log,
            stderr=log,
          )
        )
    return self

  def __exit__(self, *error):
    for process in self.processes:
      process.kill()
      process.wait()

  def finish(self):
    for process in self.processes:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(600)
    assert [process.returncode for process in self.processes] == [0] * len(self.processes), (
      self.logs()
    )

  def logs(self):
    return '\n'.join(path.read_text()[-3000:] for path in self._logs)

  def wait_for_step(self, folder, step):
    end = time.monotonic() + 600
    while time.monotonic() < end and all(process.poll() is None for process in self.processes):
      if (layout.steps_in(folder) or [-1])[-1] >= step:
        return
      time.sleep(0.01)
    raise AssertionError(f'no checkpoint of step {step}: {self.logs()}')


def assert_same_metrics(folder, expected):
  for part, names in (
    (
      'train',
      ('loss', 'bits_per_byte', 'accuracy', 'gradient_norm', 'codebook_perplexity/layer_0_1'),
    ),
    ('training_eval/tiny_bytes', ('bits_per_byte', 'cross_entropy', 'accuracy')),
  ):
    found, reference = t5x_runs.scalars(folder / part), t5x_runs.scalars(expected / part)
    for name in names:
      assert found[name] == pytest.approx(reference[name], rel=1e-5), (part, name)


def test_four_hosts_train_as_one(trained, tmp_path):
  with Hosts(SCRIPT, 4, tmp_path, NUM_MICROBATCHES=2) as hosts:
    hosts.finish()
  folder = tmp_path / 'run'
  assert_same_arrays(folder, trained)
  assert_same_metrics(folder, trained)
  positions = (layout.folder(folder, STEPS) / 'dataset').glob('process_*')
  assert sorted(path.name for path in positions) == [f'process_{i}-of-4' for i in range(4)]


def test_the_devices_of_each_host_share_sequences(trained, tmp_path):
  with Hosts(SCRIPT, 2, tmp_path, devices=2, SEQUENCE_PARTITIONS=2) as hosts:
    hosts.finish()
  assert_same_arrays(tmp_path / 'run', trained)
  assert_same_metrics(tmp_path / 'run', trained)


# On CPU, T5X's mesh has the devices of a host on its model axis, and no others.
_ACROSS_HOSTS = """
import runpy
import jax
import numpy as np
from jax.sharding import Mesh
from t5x import partitioning

def mesh(*args, **kwargs):
  return Mesh(np.array(jax.devices()).reshape(1, -1), ('data', 'model'))

partitioning.default_mesh = mesh
runpy.run_module('t5x.train', run_name='__main__', alter_sys=True)
"""


def test_hosts_that_share_sequences_go_on_together(trained, tmp_path):
  program, folder = ['-c', _ACROSS_HOSTS], tmp_path / 'run'
  settings = {'SEQUENCE_PARTITIONS': 2, 'CHECKPOINT_PERIOD': 2}
  with Hosts(program, 2, tmp_path, **settings) as hosts:
    hosts.wait_for_step(folder, 4)
  assert layout.steps_in(folder)[-1] < STEPS
  with Hosts(program, 2, tmp_path, **settings) as hosts:
    hosts.finish()
  assert_same_arrays(folder, trained)
  assert_same_metrics(folder, trained)


def test_a_host_dies_and_all_are_started_again(trained, tmp_path):
  folder = tmp_path / 'run'
  with Hosts(MODULE, 2, tmp_path, CHECKPOINT_PERIOD=2) as hosts:
    hosts.wait_for_step(folder, 4)
    hosts.processes[1].send_signal(signal.SIGKILL)
    hosts.processes[1].wait()
    hosts.processes[0].kill()  # As whatever started them would do.
  last = layout.steps_in(folder)[-1]
  assert 4 <= last < STEPS
  with Hosts(MODULE, 2, tmp_path, CHECKPOINT_PERIOD=2) as hosts:
    hosts.finish()
  assert_same_arrays(folder, trained)
  assert_same_metrics(folder, trained)


@pytest.mark.slow
def test_longvq_whose_codes_are_replaced_trains_on_two_hosts_as_on_one(tmp_path):
  """The keys that codes are set to are those of the same places in the global batch."""
  steps = 12
  macros = {
    'TRAIN_STEPS': steps,
    'CHECKPOINT_PERIOD': steps,
    'EVAL_PERIOD': steps,
    'config.TransformerConfig.codes_from_keys': True,
    'config.TransformerConfig.replace_below': 0.5,
    'longvq.LongVQ.state_size': 4,
  }
  files = [t5x_runs.TINY, str(t5x_runs.ROOT / 'gin' / 'models' / 'longvq.gin')]
  t5x_runs.train(tmp_path / 'one', files=files, **macros)
  with Hosts(SCRIPT, 2, tmp_path, files, NUM_MICROBATCHES=2, **macros) as hosts:
    hosts.finish()
  # Normalized keys leave little of the gradients of what scales them.
  assert_same_arrays(tmp_path / 'run', tmp_path / 'one', steps, 20 * 1e-5)
