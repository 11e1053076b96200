"""Commands ask no server for anything: where there is no network, some would wait for minutes."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from util import one_device

from tvq_t5x import evaluate, sample, train
from tvq_t5x.commands.sampling_options import Options

_TESTS = pathlib.Path(__file__).parents[1]
_TINY = str(_TESTS / 'tiny.gin')
pytestmark = pytest.mark.usefixtures('cleared_gin')


@pytest.mark.slow
def test_a_run_its_evaluation_and_its_samples_ask_for_nothing(tmp_path, no_network, capsys):
  folder = tmp_path / 'run'
  settings = {'TRAIN_STEPS': 8, 'TEST_SPLIT': None, 'MODEL_DIR': str(folder)}
  bindings = [f'{name} = {value!r}' for name, value in settings.items()]
  bindings.append('runner.train.sample_cfg = None')
  modules = ['tiny_task']
  with one_device():
    assert train.run([_TINY], bindings) == 0
    assert evaluate.run([], checkpoint=str(folder), modules=modules) == 0
    options = Options(prompt=('the ',), max_tokens=2)
    assert sample.run([], [], [], str(folder), options, modules) == 0
  assert 'the ' in capsys.readouterr().out
  assert no_network == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('strace'), reason='strace is not installed')
def test_libraries_in_c_do_not_ask_either(tiny_run, tmp_path):
  log = tmp_path / 'log'
  arguments = [f'--checkpoint={tiny_run}', '--module=tiny_task', '--split=test']
  done = subprocess.run(
    ['strace', '-f', '-e', 'trace=connect', '-o', str(log)]
    + [sys.executable, '-m', 'tvq_t5x.evaluate', *arguments],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, 'PYTHONPATH': str(_TESTS)},
  )
  assert done.returncode == 0, done.stderr
  assert re.findall(r'.*AF_INET.*', log.read_text()) == []
