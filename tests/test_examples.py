"""The scripts and the notebook of examples/ run from the top to the bottom, with tiny sizes."""

import os
import pathlib
import runpy
import shutil
import sys

import pytest
from util import one_device

import tvq_t5x
from tvq_t5x.generation import language_model

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / 'examples'
TINY = [
  *(f'{name}_PERIOD = 8' for name in ('LOG', 'EVAL', 'SAMPLE', 'CHECKPOINT')),
  'TRAIN_STEPS = 8',
  'WARMUP_STEPS = 2',
  'runner.train.sample_cfg = None',
  *(f'config.TransformerConfig.{name} = 16' for name in ('emb_dim', 'key_dim', 'value_dim')),
  'config.TransformerConfig.num_codes = 8',
]
TINY_TASK = [
  "MIXTURE_OR_TASK_NAME = 'tiny_bytes'",
  "MIXTURE_OR_TASK_MODULE = 'tiny_task'",
  "TASK_FEATURE_LENGTHS = {'targets': 64}",
  'UPDATE_LEN = 64',
]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('cleared_gin')]


@pytest.fixture
def run_script(monkeypatch):
  """Runs one as `python examples/NAME.py ARGUMENT ...` does."""
  # Their own modules, and the one of the task that takes the place of theirs.
  load = language_model.load
  monkeypatch.setattr(
    tvq_t5x, 'load', lambda path, modules=(): load(path, modules=[*modules, 'tiny_task'])
  )
  monkeypatch.chdir(ROOT)
  monkeypatch.syspath_prepend(EXAMPLES)

  def run(name, *arguments):
    monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
    with one_device():
      runpy.run_path(str(EXAMPLES / f'{name}.py'), run_name='__main__')

  yield run
  for name in ('own_mixer', 'own_task'):
    sys.modules.pop(name, None)


def test_own_mixer(run_script, tmp_path, capsys):
  run_script('own_mixer', tmp_path / 'run', *TINY, *TINY_TASK)
  shown = capsys.readouterr().out
  assert 'sublayers of a layer: attention_0, mlp, shift_0' in shown and 'Score(54 tokens' in shown


def test_own_task(run_script, tmp_path, capsys):
  run_script('own_task', tmp_path / 'run', *TINY)
  lines = capsys.readouterr().out.splitlines()
  assert [line.split('=')[0] for line in lines[-3:]] == ['2+2', '3+4', '9+8']


@pytest.mark.parametrize('given', [True, False])
def test_sample_from_python(run_script, tiny_run, tmp_path, capsys, monkeypatch, given):
  run = shutil.copytree(tiny_run, tmp_path / 'run')
  monkeypatch.setattr(tvq_t5x, 'train_model', lambda *unused: tvq_t5x.Run(run))
  run_script('sample_from_python', *([run] if given else []))
  shown = capsys.readouterr().out
  assert f'step 16 of {run / "checkpoint_16"}' in shown
  assert 'GenerationState(2 sequences' in shown and shown.count(' bits per byte: And') == 2


def test_the_notebook(tmp_path, monkeypatch):
  nbclient, nbformat = (pytest.importorskip(x) for x in ('nbclient', 'nbformat'))
  path = EXAMPLES / 'train_on_my_text.ipynb'
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get('outputs') for cell in notebook.cells)  # Nor paths of a machine.
  monkeypatch.setenv('STEPS', '8')
  flags = [x for x in os.environ['XLA_FLAGS'].split() if 'device_count' not in x]
  monkeypatch.setenv('XLA_FLAGS', ' '.join(flags))  # A kernel has one device.
  client = nbclient.NotebookClient(
    notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(tmp_path)}}
  )
  client.execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
  shown = ''.join(output.get('text', '') for output in outputs)
  assert 'step 8/8 (100%)' in shown and 'Finished, step 8, test: bits_per_byte' in shown
  kinds = [set(output.get('data', ())) for output in outputs]
  assert {'text/plain', 'text/html'} in kinds and {'text/plain', 'image/png'} in kinds
  # What is wrong would be there; a kernel has its own words of its debugger.
  assert [o for o in outputs if o.get('name') == 'stderr'] == []
  assert os.listdir(tmp_path / 'runs' / 'my_text' / 'samples') == ['00000008.txt']
