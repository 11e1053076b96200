"""The code in docs/extending.md and docs/own_data.md does what the pages say."""

import inspect
import pathlib
import re
import sys

import numpy as np
import pytest
from util import one_device

import tvq_t5x
from tvq_t5x import train, train_vocab
from tvq_t5x.checkpoints import layout
from tvq_t5x.generation import language_model
from tvq_t5x.standalone import run_records
from tvq_t5x.training import writers

ROOT = pathlib.Path(__file__).parents[1]
TINY = str(ROOT / 'tests' / 'tiny.gin')
MACROS = [
  'TRAIN_STEPS = 8',
  'EVAL_PERIOD = 8',
  'CHECKPOINT_PERIOD = 8',
  'TEST_SPLIT = None',
  'runner.train.sample_cfg = None',
]
pytestmark = pytest.mark.usefixtures('cleared_gin')


@pytest.fixture
def pieces(tmp_path, monkeypatch):
  """The code of the pages, in files of the names that they have there."""
  found = {}
  for page in ('extending', 'own_data'):
    text = (ROOT / 'docs' / f'{page}.md').read_text()
    for code in re.findall(r'```(?:python|gin)\n(.*?)```', text, re.DOTALL):
      name = code.splitlines()[0].removeprefix('# ')
      found[name] = tmp_path / name
      found[name].write_text(code)
      monkeypatch.delitem(sys.modules, name.removesuffix('.py'), raising=False)
  monkeypatch.syspath_prepend(tmp_path)
  yield found
  for name in found:
    sys.modules.pop(name.removesuffix('.py'), None)


@pytest.mark.slow
def test_all_at_once(pieces, tmp_path, capsys):
  names = ('my_loss', 'my_mixer', 'my_optimizer', 'my_writer')
  folder = tmp_path / 'run'
  with one_device():
    files = [TINY, *(str(pieces[f'{name}.gin']) for name in names)]
    assert train.run(files, [*MACROS, f'MODEL_DIR = {str(folder)!r}']) == 0
    modules = [*names, 'tiny_task']
    lm = language_model.load(str(folder), modules=modules)
  assert 'ZLoss' in [x.__name__ for x in type(lm.loaded.model).__mro__]
  params = lm.loaded.params['layers']
  assert set(params) == {'previous_0', 'attention_0', 'mlp'}
  arrays = layout.newest_metadata(folder)[1]['arrays']
  assert any('trace' in name for name in arrays) and not any('/mu/' in name for name in arrays)
  lines = (folder / 'lines.txt').read_text().splitlines()
  records = run_records.read_records(folder / 'metrics.jsonl')
  assert len(lines) == sum(len(record) - 2 for record in records)
  train_records = [r for r in records if r['split'] == 'train']
  assert (folder / 'csv' / 'train.csv').read_text().count('\n') == 1 + len(train_records)
  # What the mixer remembers makes a text in parts the same text.
  whole, first = lm.inspect('the sea and the ship'), lm.score('the sea an')
  second = lm.inspect('d the ship', first.state)
  np.testing.assert_allclose(second.logits, whole.logits[10:], rtol=1e-4, atol=1e-4)


def test_mlflow(pieces, tmp_path, monkeypatch):
  mlflow = pytest.importorskip('mlflow', reason='mlflow is not installed: a writer for it')
  monkeypatch.setenv('MLFLOW_TRACKING_URI', (tmp_path / 'mlruns').as_uri())
  monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')  # A database needs more packages.
  import my_mlflow

  for last_step in (0, 4):
    writer = writers.make([my_mlflow.Mlflow], tmp_path, last_step)
    writer.write_scalars(last_step + 4, {'train/loss': np.float32(1.5)})
    writer.write_texts(last_step + 4, {'validation/sample/0': 'text'})
    writer.write_histograms(last_step + 4, {'validation/code_usage/layer_0': np.ones(3)})
    writer.close()
  number = (tmp_path / 'mlflow_run').read_text()
  history = mlflow.MlflowClient().get_metric_history(number, 'train/loss')
  assert [(x.step, x.value) for x in history] == [(4, 1.5), (8, 1.5)]
  assert mlflow.artifacts.load_text(f'runs:/{number}/validation/sample/0/8.txt') == 'text'


def test_training_in_a_notebook(pieces, tiny_run, monkeypatch):
  asked = []

  def train_model(*arguments, **more):
    asked.append((arguments, more))
    return tvq_t5x.Run(tiny_run)

  # Its arguments are those of the real one.
  inspect.signature(tvq_t5x.train_model).bind(
    'gin/text_tiny.gin', 'runs/text', ['TRAIN_STEPS = 600'], data_dir='texts'
  )
  real = language_model.load
  monkeypatch.setattr(tvq_t5x, 'train_model', train_model)
  monkeypatch.setattr(tvq_t5x, 'load', lambda run: real(run, modules=['tiny_task']))
  found = {}
  with one_device():
    exec(pieces['notebook.py'].read_text(), found)
  assert asked == [
    (('gin/text_tiny.gin', 'runs/text', ['TRAIN_STEPS = 600']), {'data_dir': 'texts'})
  ]
  assert repr(found['lm']).startswith('LanguageModel(')


def test_what_is_seen_of_a_text(pieces, tiny_run, monkeypatch, capsys):
  real = language_model.load
  monkeypatch.setattr('tvq_t5x.load', lambda path: real(str(tiny_run), modules=['tiny_task']))
  with one_device():
    exec(pieces['inspect_text.py'].read_text(), {})
  shown = capsys.readouterr().out.splitlines()
  assert shown[0] == '(39,) (39, 264)' and shown[1] == '(1, 39, 16)'
  assert shown[2].startswith('layers_0/attention_0 [')


def test_a_task_in_python(pieces, tmp_path):
  bindings = {'MIXTURE_OR_TASK_NAME': 'my_task', 'MIXTURE_OR_TASK_MODULE': 'my_task'}
  settings = [f'{name} = {value!r}' for name, value in bindings.items()]
  settings += ['WARMUP_STEPS = 4', f'MODEL_DIR = {str(tmp_path / "run")!r}']
  with one_device():
    assert train.run(['gin/kjv_tiny.gin'], settings, dry_run=True) == 0
  output = str(tmp_path / 'mine')
  assert train_vocab.run('my_task', (), output, 290, 10**6, module='my_task') == 0
  assert pathlib.Path(f'{output}.model').exists()


def test_inputs_are_targets_one_place_later():
  from tvq_t5x.data import datasets, indexed
  from tvq_t5x.data.feature_converters import TransformerVQFeatureConverter

  name = 'extending_inputs'
  task = indexed.byte_level_task(name, lambda split: [b'ab'], splits=('test',))
  cfg = datasets.DatasetConfig(task, {'targets': 3}, 'test', 1, False, 0)
  batch = next(iter(datasets.evaluation_batches(cfg, TransformerVQFeatureConverter)))
  text = (ROOT / 'docs' / 'extending.md').read_text()
  for feature in ('target_tokens', 'input_tokens', 'loss_weights'):
    (row,) = re.findall(rf'decoder_{feature} +([\d, ]+)\n', text)
    assert batch[f'decoder_{feature}'][0].tolist() == list(map(int, row.split(',')))
