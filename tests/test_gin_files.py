"""Every gin file that is shipped can be read; nothing that both engines read names an engine."""

import importlib.util
import pathlib
import re

import gin
import jax
import pytest

from tvq_t5x import gin_utils, train
from tvq_t5x.errors import ConfigError

_ROOT = pathlib.Path(gin_utils.gin_root())
_FILES = sorted(str(path.relative_to(_ROOT)) for path in _ROOT.rglob('*.gin'))
_RUNS = [name for name in _FILES if '/' not in name]
_OF_T5X = 'runs/pretrain.gin'
_OF_RUNNER = 'standalone/gin/runs/pretrain.gin'
_SHARED = [name for name in _FILES if name not in (_OF_T5X, _OF_RUNNER)]


@pytest.fixture(autouse=True)
def _clear():
  yield
  gin.clear_config()


def test_there_are_files():
  assert {'kjv_tiny.gin', _OF_T5X, _OF_RUNNER} <= set(_FILES)


def test_no_folder_is_a_package():
  # On sys.path, `gin` would hide gin-config.
  assert not list(_ROOT.rglob('__init__.py'))


@pytest.mark.parametrize('name', _RUNS)
def test_run_files_pass_the_checks_from_any_folder(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  gin_utils.parse_gin([f'gin/{name}'], [f"MODEL_DIR = '{tmp_path}'"])
  assert gin.query_parameter('MODEL_DIR/gin.macro.value') == str(tmp_path)


@pytest.mark.parametrize('name', _RUNS)
def test_run_files_need_nothing_but_a_model_dir(name):
  with pytest.raises(ConfigError, match='^required, but not set: MODEL_DIR; '):
    gin_utils.parse_gin([f'gin/{name}'], [])


@pytest.mark.parametrize('name', _RUNS)
def test_run_files_say_what_they_are(name):
  header = (_ROOT / name).read_text().split('from __gin__')[0]
  for part in ('Parameters:', 'Tokens:', 'Hardware:', f'--gin_file=gin/{name}'):
    assert part in header


def _bindings(tmp_path):
  # The tests' virtual devices share the batch.
  return [f"MODEL_DIR = '{tmp_path / 'run'}'", f'BATCH_SIZE = {jax.device_count()}']


@pytest.mark.parametrize('name', _RUNS)
def test_parameter_count_is_the_one_written_down(name, tmp_path, capsys):
  assert train.run([f'gin/{name}'], _bindings(tmp_path), dry_run=True) == 0
  written = re.search(r'Parameters: ([\d,]+)', (_ROOT / name).read_text())
  assert written and f'parameters: {written[1]}\n' in capsys.readouterr().out


@pytest.mark.parametrize('name', _SHARED)
def test_shared_files_name_neither_engine(name):
  text = (_ROOT / name).read_text()
  imported = re.findall(r'^(?:from|import) +(\S+)', text, re.MULTILINE)
  assert {module.split('.')[0] for module in imported} <= {'__gin__', 'tvq_t5x'}
  assert 'runner' not in text and 't5x.train' not in text.replace('tvq_t5x.train', '')


@pytest.mark.parametrize('name', [name for name in _SHARED if '/' in name])
def test_parts_can_be_read_alone(name):
  gin.clear_config()
  with gin.unlock_config():
    gin.parse_config_file(str(_ROOT / name))


@pytest.mark.parametrize('part', [n for n in _SHARED if n.startswith(('mesh/', 'optimizers/'))])
def test_parts_can_be_exchanged(part, tmp_path):
  files = ['gin/kjv_tiny.gin', f'gin/{part}']
  assert train.run(files, _bindings(tmp_path), dry_run=True) == 0


def test_both_pretrain_files_set_the_same_macros():
  def macros(name):
    return set(re.findall(r'^([A-Z_]+) =', (_ROOT / name).read_text(), re.MULTILINE))

  required = {'MIXTURE_OR_TASK_NAME', 'TASK_FEATURE_LENGTHS', 'TRAIN_STEPS', 'MODEL_DIR'}
  assert required <= macros(_OF_RUNNER)
  assert macros(_OF_T5X) <= macros(_OF_RUNNER)


@pytest.mark.skipif(not importlib.util.find_spec('t5x'), reason='T5X is not installed')
def test_t5x_run_file_can_be_read():
  gin.clear_config()
  gin.add_config_file_search_path(str(_ROOT.parent))
  gin.parse_config_file(str(_ROOT / _OF_T5X))
