"""The plan of a LongVQ run whose codes live: its FFTs and replaced codes compile for TPUs too."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

_TESTS = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed')
def test_it_compiles_for_tpus_on_a_mesh():
  settings = {
    'NUM_PARTITIONS': 2,
    'NUM_MICROBATCHES': 2,
    'config.TransformerConfig.codes_from_keys': True,
    'config.TransformerConfig.replace_below': 0.1,
  }
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'tvq_t5x.plan', '--topology=v3:2x2'),
      f'--gin_file={_TESTS / "tiny.gin"}',
      f'--gin_file={_TESTS.parent / "gin" / "models" / "longvq.gin"}',
      *(f'--gin.{name}={value!r}' for name, value in settings.items()),
    ],
    env={**os.environ, 'XLA_FLAGS': '', 'PYTHONPATH': str(_TESTS)},
    cwd=_TESTS.parent,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert '| devices | 8 (TPU v3 cores), data 4 x model 2 |' in done.stdout
  assert re.search(r'\| so, estimated, tokens/s \| \d', done.stdout)
