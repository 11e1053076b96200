"""The machine that numbers were measured on, in words."""

import os
import pathlib
import platform
import re

import jax


def name() -> str:
  """Such as '2 cores of Intel(R) Xeon(R) Processor, JAX 0.10.2', or '8 x TPU v3, ...'."""
  devices = jax.devices()
  if devices[0].platform == 'cpu':
    kind = f'{os.cpu_count()} cores of {_processor()}'
  else:
    kind = f'{len(devices)} x {devices[0].device_kind}'
  return f'{kind}, JAX {jax.__version__}'


def _processor() -> str:
  path = pathlib.Path('/proc/cpuinfo')
  if path.exists() and (found := re.search(r'model name\s*: (.*)', path.read_text('utf-8'))):
    return found[1]
  return platform.processor() or platform.machine()
