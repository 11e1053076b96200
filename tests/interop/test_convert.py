"""`python -m tvq_t5x.convert`: a checkpoint to a folder and back, and what is refused."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from absl import flags
from data_util import two_sentencepiece_models
from util import one_device

from tvq_t5x import convert, evaluate, train
from tvq_t5x.checkpoints import layout
from tvq_t5x.common import named_arrays
from tvq_t5x.generation import language_model

_TINY = str(pathlib.Path(__file__).parents[1] / 'tiny.gin')
_MODULE = '--module=tiny_task'  # The run's task is not the package's own.
pytestmark = pytest.mark.usefixtures('cleared_gin')


def _call(command, *args):
  values = flags.FlagValues()
  command.define_flags(values)
  values(['command', *map(str, args)])
  with one_device():
    return command.run_flags(values)


def _convert(*args, module=_MODULE):
  return _call(convert, *args, *([module] if module else []))


@pytest.fixture(scope='module')
def exported(tiny_run, tmp_path_factory):
  """The folder of the run's checkpoint."""
  folder = tmp_path_factory.mktemp('exported') / 'tiny'
  assert _convert(f'--checkpoint={tiny_run}', f'--output={folder}') == 0
  return folder


@pytest.fixture(scope='module')
def restored(exported, tmp_path_factory):
  """MODEL_DIR made of that folder."""
  folder = tmp_path_factory.mktemp('restored') / 'run'
  assert _convert(f'--folder={exported}', f'--output={folder}') == 0
  return folder


@pytest.fixture
def copied(exported, tmp_path):
  """A copy of the folder, to be changed."""
  return shutil.copytree(exported, tmp_path / 'copied')


def _saved(checkpoint):
  return named_arrays.leaves_of(ocp.PyTreeCheckpointer().restore(checkpoint / 'state')['target'])


def _scores(checkpoint, tmp_path):
  path = tmp_path / 'scores.json'
  assert _call(evaluate, f'--checkpoint={checkpoint}', f'--json={path}', _MODULE) == 0
  scores = json.loads(path.read_text())
  return {k: x for k, x in scores.items() if k not in ('checkpoint', 'seconds')}


def test_names_and_arrays_are_those_of_the_checkpoint(tiny_run, exported):
  arrays = safetensors.numpy.load_file(exported / 'model.safetensors')
  saved = _saved(tiny_run / 'checkpoint_16')
  # The network scans its layers, of which there is one.
  names = {x.replace('layers/', 'layers/0/').replace('/', '.'): x for x in saved}
  assert arrays.keys() == names.keys()
  for name, x in arrays.items():
    expected = saved[names[name]]
    np.testing.assert_array_equal(x, expected[0] if name.startswith('layers.') else expected)
    assert x.dtype == np.float32


def test_settings_and_page_say_what_the_model_is(tiny_run, exported):
  settings = json.loads((exported / 'config.json').read_text())
  assert settings['hyperparameters'] == layout.read_metadata(tiny_run / 'checkpoint_16')['model']
  assert settings['tvq_t5x']['step'] == 16
  assert settings['tvq_t5x']['vocabulary'] == 'bytes'
  records = map(json.loads, (tiny_run / 'metrics.jsonl').read_text().splitlines())
  score = next(r for r in records if r['split'] == 'test')['bits_per_byte']
  assert f'| bits_per_byte | {score:.4f} |' in (exported / 'README.md').read_text()
  assert str(tiny_run) not in (exported / 'config.gin').read_text()


def test_a_model_comes_back_and_scores_the_same(tiny_run, restored, tmp_path):
  before, after = _saved(tiny_run / 'checkpoint_16'), _saved(restored / 'checkpoint_16')
  assert before.keys() == after.keys()
  for name, x in before.items():
    np.testing.assert_array_equal(after[name], x)
  assert _scores(restored, tmp_path) == _scores(tiny_run, tmp_path)


@pytest.mark.slow
def test_a_run_starts_from_a_model_that_came_back(restored, tmp_path, logged):
  settings = {'MODEL_DIR': str(tmp_path / 'tuned'), 'INITIAL_CHECKPOINT_PATH': str(restored)}
  bindings = [f'{name} = {x!r}' for name, x in {**settings, 'TRAIN_STEPS': 18}.items()]
  bindings.append('runner.train.sample_cfg = None')
  with one_device():
    assert train.run([_TINY, 'gin/runs/finetune.gin'], bindings) == 0
  assert layout.steps_in(tmp_path / 'tuned') == [18]


def test_a_run_may_start_from_a_model_that_came_back(tiny_run, restored, tmp_path, logged):
  before, after = (layout.read_metadata(run / 'checkpoint_16') for run in (tiny_run, restored))
  names = [name for name in before if name not in ('checksums', 'window')]
  assert {name: after[name] for name in names} == {name: before[name] for name in names}
  settings = {'MODEL_DIR': str(tmp_path / 'run'), 'INITIAL_CHECKPOINT_PATH': str(restored)}
  bindings = [f'{name} = {x!r}' for name, x in {**settings, 'TRAIN_STEPS': 18}.items()]
  with one_device():
    assert train.run([_TINY, 'gin/runs/finetune.gin'], bindings, dry_run=True) == 0


def test_a_converted_run_is_not_gone_on_with(restored, tmp_path, capsys, logged):
  folder = shutil.copytree(restored, tmp_path / 'run')
  with one_device():
    assert train.run([_TINY], [f'MODEL_DIR = {str(folder)!r}']) == 1
  assert 'INITIAL_CHECKPOINT_PATH' in capsys.readouterr().err
  assert layout.steps_in(folder) == [16]


def test_bfloat16_rounds_all_but_codebooks(tiny_run, exported, tmp_path):
  folder = tmp_path / 'small'
  flag = '--dtype=bfloat16'
  assert _convert(f'--checkpoint={tiny_run}', f'--output={folder}', flag) == 0
  exact = safetensors.numpy.load_file(exported / 'model.safetensors')
  arrays = safetensors.numpy.load_file(folder / 'model.safetensors')
  assert arrays.keys() == exact.keys()
  for name, x in arrays.items():
    is_codebook = '.quantizer.' in name
    assert x.dtype == (np.float32 if is_codebook else ml_dtypes.bfloat16), name
    np.testing.assert_array_equal(x, exact[name].astype(x.dtype))
  assert _convert(f'--folder={folder}', f'--output={tmp_path / "run"}') == 0
  saved = _saved(tmp_path / 'run' / 'checkpoint_16')
  name = 'token_embedder.embedding'
  np.testing.assert_array_equal(saved['token_embedder/embedding'], arrays[name].astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize('macro', [False, True])
def test_a_vocabulary_goes_with_the_model(tmp_path, monkeypatch, macro):
  (model, _) = two_sentencepiece_models(tmp_path)
  settings = {
    'MODEL_DIR': str(tmp_path / 'run'),
    'MIXTURE_OR_TASK_NAME': 'tiny_pieces',
    'VOCAB_SIZE': 304,
    'TRAIN_STEPS': 2,
    'WARMUP_STEPS': 1,
  }
  gin_files = [_TINY]
  if macro:
    gin_file = tmp_path / 'vocabulary.gin'
    gin_file.write_text(
      'from __gin__ import dynamic_registration\nfrom tvq_t5x.data import vocabularies\n'
      'vocabularies.sentencepiece_model.path = %SENTENCEPIECE_MODEL\n'
    )
    gin_files, settings = [*gin_files, str(gin_file)], {**settings, 'SENTENCEPIECE_MODEL': model}
  else:
    monkeypatch.setenv('SENTENCEPIECE_MODEL', model)
  bindings = [f'{name} = {x!r}' for name, x in settings.items()]
  with one_device():
    assert train.run(gin_files, [*bindings, 'runner.train.sample_cfg = None']) == 0
  content = pathlib.Path(model).read_bytes()
  assert _convert(f'--checkpoint={tmp_path / "run"}', f'--output={tmp_path / "folder"}') == 0
  assert (tmp_path / 'folder' / 'sentencepiece.model').read_bytes() == content
  assert str(tmp_path) not in (tmp_path / 'folder' / 'config.gin').read_text()

  monkeypatch.delenv('SENTENCEPIECE_MODEL', raising=False)
  pathlib.Path(model).unlink()
  elsewhere = shutil.move(tmp_path / 'folder', tmp_path / 'moved')
  assert _convert(f'--folder={elsewhere}', f'--output={tmp_path / "back"}') == 0
  shutil.rmtree(elsewhere)
  lm = language_model.load(str(tmp_path / 'back'), modules=['tiny_task'])
  assert lm.text(lm.encode('the sea')) == 'the sea'


@pytest.mark.slow
def test_no_data_is_needed(tmp_path):
  (tmp_path / 'texts').mkdir()
  (tmp_path / 'texts' / 'a.txt').write_text('in the beginning was the word\n' * 999)
  settings = {
    'MODEL_DIR': str(tmp_path / 'run'), 'TASK_FEATURE_LENGTHS': {'targets': 64}, 'UPDATE_LEN': None,
    'TRAIN_STEPS': 1, 'WARMUP_STEPS': 0, 'EVAL_PERIOD': 1, 'CHECKPOINT_PERIOD': 1, 'LOG_PERIOD': 1,
  }  # fmt: skip
  bindings = [
    *(f'{name} = {x!r}' for name, x in settings.items()),
    'runner.train.sample_cfg = None',
  ]
  with one_device():
    assert train.run(['gin/text_tiny.gin'], bindings, data_dir=str(tmp_path / 'texts')) == 0
  shutil.rmtree(tmp_path / 'texts')
  run, folder, back = (tmp_path / name for name in ('run', 'folder', 'back'))
  assert _convert(f'--checkpoint={run}', f'--output={folder}', module='') == 0
  assert _convert(f'--folder={folder}', f'--output={back}', module='') == 0
  before, after = (_saved(x / 'checkpoint_1') for x in (run, back))
  assert before.keys() == after.keys()
  for name, x in before.items():
    np.testing.assert_array_equal(x, after[name])


def _edit(path, **changes):
  content = json.loads(path.read_text())
  for name, value in changes.items():
    *parents, last = name.split('__')
    part = content
    for parent in parents:
      part = part[parent]
    part[last] = value
  path.write_text(json.dumps(content))


def _shorten(path):
  path.write_bytes(path.read_bytes()[:-10])


def _claim(path):
  """Makes an array one of terabytes, as far as the header says."""
  arrays = safetensors.numpy.load_file(path)
  content = safetensors.numpy.save(arrays)
  size = int.from_bytes(content[:8], 'little')
  header = json.loads(content[8 : 8 + size])
  header['token_embedder.embedding']['shape'] = [1 << 40, 16]
  new = json.dumps(header).encode()
  path.write_bytes(len(new).to_bytes(8, 'little') + new + content[8 + size :])


def _other_array(path):
  arrays = safetensors.numpy.load_file(path)
  arrays['logits.bias'] = arrays['logits.bias'][1:]
  safetensors.numpy.save_file(arrays, path)


@pytest.mark.parametrize(
  ('name', 'damage', 'code', 'part'),
  [
    ('model.safetensors', _shorten, 1, 'can not be read'),
    ('model.safetensors', _claim, 1, 'can not be read'),
    ('model.safetensors', lambda path: path.write_bytes(b'PK\3\4 of torch.save'), 1, 'can not be'),
    ('model.safetensors', pathlib.Path.unlink, 1, 'can not be read'),
    ('model.safetensors', _other_array, 2, 'logits.bias is [264], there [263]'),
    ('config.json', _shorten, 1, 'can not be read'),
    ('config.json', lambda path: path.write_text('[' * 100_000), 1, 'can not be read'),
    ('config.json', lambda path: path.write_text('{"model_type": "gpt2"}'), 1, 'not written by'),
    ('config.json', lambda path: _edit(path, tvq_t5x__format_version=2), 1, 'a later version'),
    ('config.json', lambda path: _edit(path, tvq_t5x__step='16'), 1, "the field 'step'"),
    ('config.json', lambda path: _edit(path, tvq_t5x__data=[]), 1, "the field 'data'"),
    ('config.json', lambda path: _edit(path, hyperparameters=[1]), 1, "'hyperparameters'"),
    (
      'config.json',
      lambda path: _edit(path, hyperparameters__window_len=16),
      2,
      'TransformerConfig.window_len = 8, there 16',
    ),
    ('config.gin', lambda path: path.write_text('import os\n'), 2, 'is refused'),
    ('config.gin', pathlib.Path.unlink, 2, '--gin_file'),
  ],
)
def test_a_folder_that_can_not_be_read_is_one_line(
  copied, tmp_path, capsys, name, damage, code, part
):
  damage(copied / name)
  assert _convert(f'--folder={copied}', f'--output={tmp_path / "run"}') == code
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1 and part in error
  assert [path.name for path in tmp_path.iterdir()] == ['copied']


@pytest.mark.parametrize(
  ('args', 'part'),
  [
    ([], '--checkpoint, --folder, --author_checkpoint'),
    (['--checkpoint={run}', '--folder={run}'], 'give one of --checkpoint, --folder'),
    (['--checkpoint={run}'], '--output'),
    (['--checkpoint={run}', '--output={run}'], 'is there already'),
    (['--checkpoint={run}', '--output={tmp}/out', '--author_settings=x'], '--author_settings'),
    (['--folder={run}', '--output={tmp}/out'], 'there is no config.json'),
    (['--folder={tmp}/none', '--output={tmp}/out'], '/none: there is no such folder'),
    (['--folder={run}', '--output={tmp}/out', '--dtype=bfloat16'], '--dtype is for --checkpoint'),
    (['--checkpoint={run}', '--output={tmp}/out', '--evaluation={run}/none'], '--evaluation='),
    (['--author_checkpoint={run}', '--output={tmp}/out'], '--author_settings'),
    (['--author_checkpoint={run}', '--output={tmp}/out', '--module=x'], '--module=x'),
  ],
)
def test_wrong_flags_are_refused(tiny_run, tmp_path, capsys, args, part):
  args = [arg.format(run=tiny_run, tmp=tmp_path) for arg in args]
  module = _MODULE if any(arg.startswith('--checkpoint') for arg in args) else None
  assert _convert(*args, module=module) == 2
  error = capsys.readouterr().err
  assert part in error and error.count('\n') == 1
  assert not list(tmp_path.iterdir())
