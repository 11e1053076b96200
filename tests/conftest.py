"""Options of the whole test suite."""

import os
import pathlib

# Before JAX starts: devices to place arrays on, and quick compilation, as tests run little.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  ' --xla_llvm_disable_expensive_passes=true',
)


def pytest_addoption(parser):
  parser.addoption(
    '--golden-dir',
    default=str(pathlib.Path(__file__).parent / 'golden'),
    help='Folder of .npz files from the reference implementation to check against.',
  )
