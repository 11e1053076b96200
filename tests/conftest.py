"""Options of the whole test suite."""

import gc
import importlib.util
import logging
import os
import pathlib
import signal
import tempfile

import pytest

# Before JAX starts: devices to place arrays on, and quick compilation, as tests run little.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  ' --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false',
)
# What several tests compile is compiled once: by all workers, and by commands that tests start.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
# What JAX traces stays for the next test: to look through it often is some 6% of the time.
gc.set_threshold(200_000, 20, 100)


def pytest_configure(config):
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix='compiled-')
    config.add_cleanup(folder.cleanup)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder.name


def pytest_addoption(parser):
  parser.addoption(
    '--golden-dir',
    default=str(pathlib.Path(__file__).parent / 'golden'),
    help='Folder of .npz files from the reference implementation to check against.',
  )


@pytest.fixture
def logged(caplog):
  """Captures what a run logs, and clears gin's configuration after it."""
  import gin

  caplog.set_level(logging.INFO, logger='absl')
  yield
  gin.clear_config()


@pytest.fixture
def tpus(monkeypatch):
  """Of a topology such as 'v5e:1x2', TPUs that are not there, to compile programs for."""
  import jax

  from tvq_t5x.planning import topologies

  if not importlib.util.find_spec('libtpu'):
    pytest.skip('libtpu is not installed: what the compiler for TPUs makes of it is not looked at')
  assert jax.devices('cpu')  # They have read the flags, at some of which the TPU compiler ends.
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  return topologies.devices_of


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
  """MODEL_DIR of a short run of tiny.gin by the standalone runner, with checkpoints 8 and 16."""
  import gin
  from util import one_device

  from tvq_t5x import train

  folder = tmp_path_factory.mktemp('tiny_run') / 'run'
  settings = {'TRAIN_STEPS': 16, 'CHECKPOINT_PERIOD': 8, 'MODEL_DIR': str(folder)}
  bindings = [f'{name} = {value!r}' for name, value in settings.items()]
  tiny = pathlib.Path(__file__).parent / 'tiny.gin'
  with one_device():
    assert train.run([str(tiny)], [*bindings, 'runner.train.sample_cfg = None']) == 0
  gin.clear_config()
  return folder


@pytest.fixture
def cleared_gin():
  """Clears gin's configuration after a test."""
  import gin

  yield
  gin.clear_config()


@pytest.fixture
def no_network(monkeypatch):
  """Refuses what Python asks a network for; yields a list of it."""
  import socket

  asked = []

  def refusing(name):
    def refuse(*args, **kwargs):
      asked.append((name, args[-1:]))
      raise OSError('there is no network')

    return refuse

  for name in ('connect', 'connect_ex'):
    monkeypatch.setattr(socket.socket, name, refusing(name), raising=False)
  for name in ('getaddrinfo', 'gethostbyname', 'create_connection'):
    monkeypatch.setattr(socket, name, refusing(name))
  return asked


@pytest.fixture
def compiled():
  """Names of what has been compiled since the test began."""
  import jax

  names = []

  def listen(event, duration, **labels):
    if event.endswith('backend_compile_duration'):
      names.append(labels['fun_name'])

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def interruptible():
  """SIGINT as a program in the foreground has it: a shell ignores it for those behind."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)
