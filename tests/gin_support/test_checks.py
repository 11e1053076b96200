"""Mistakes that gin lets pass are refused; correct configurations, T5X-like ones too, are not."""

import pathlib
import subprocess
import sys

import gin
import pytest

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import checks  # noqa: F401, it makes gin.finalize check.

pytestmark = pytest.mark.quick

_BASE = """
import dataclasses


@dataclasses.dataclass
class Base:
  inherited: 'Width' = 1


Width = int
"""

_LIBRARY = """
from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, Optional, Union

from checks_base import Base

if typing.TYPE_CHECKING:
  from nowhere import Missing


class Kind(str, enum.Enum):
  VQ = 'vq'
  QUADRATIC = 'quadratic'


class Color(enum.Enum):
  RED = 1


Steps = typing.NewType('Steps', int)


@dataclasses.dataclass
class DataSettings:
  mixture_or_task_name: str
  task_feature_lengths: Mapping[str, int]
  batch_size: int
  split: str = 'train'
  shuffle: bool = True
  seed: Optional[int] = None
  use_cached: bool = False
  module: Optional[str] = None


@dataclasses.dataclass
class Model(Base):
  block_len: int = 512
  scan_layers: bool = False
  kind: Kind = Kind.VQ
  color: Color = Color.RED
  other: Optional[Kind] = None
  reduction: Literal['serial', 'matmul'] = 'serial'
  rate: float = 0.0
  sizes: Sequence[int] = ()
  pair: tuple[int, int] = (1, 1)
  names: list[str] | None = None
  path: Union[str, Sequence[str]] = ''
  steps: Steps = 1
  depth: Annotated[int, 'layers'] = 1
  loose: int = None
  missing: Missing = None
  init: Callable[[int], int] | None = None
  anything: typing.Any = None
  unsaid = 1


class Plain:
  def __init__(self, width: int, **kwargs: int):
    del width, kwargs


class Twin:
  def __init__(self, width: int):
    del width


def schedule(base: float = 1.0):
  return base


def train(
  model: Model,
  model_dir: str,
  train_dataset_cfg: DataSettings,
  train_eval_dataset_cfg: Optional[DataSettings],
  total_steps: int,
  random_seed: Optional[int] = None,
  learning_rate: Union[float, Callable[[int], float]] = 0.1,
  checkpoint: Optional[Plain] = None,
):
  raise AssertionError('The checks build nothing.')
"""

_RUN = """
from __gin__ import dynamic_registration

import checks_library as lib

MIXTURE_OR_TASK_NAME = %gin.REQUIRED
TASK_FEATURE_LENGTHS = %gin.REQUIRED
TRAIN_STEPS = %gin.REQUIRED
MODEL_DIR = %gin.REQUIRED
BATCH_SIZE = 128
USE_CACHED_TASKS = True
MIXTURE_OR_TASK_MODULE = None
SHUFFLE_TRAIN_EXAMPLES = True
USE_HARDWARE_RNG = False
RANDOM_SEED = None

lib.train:
  model = %MODEL
  model_dir = %MODEL_DIR
  train_dataset_cfg = @train/lib.DataSettings()
  train_eval_dataset_cfg = @train_eval/lib.DataSettings()
  total_steps = %TRAIN_STEPS
  random_seed = %RANDOM_SEED

train/lib.DataSettings:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  batch_size = %BATCH_SIZE
  shuffle = %SHUFFLE_TRAIN_EXAMPLES

train_eval/lib.DataSettings:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  split = 'validation'
  batch_size = %BATCH_SIZE
  shuffle = False
  use_cached = %USE_CACHED_TASKS
"""

_SET = """
LENGTH = 512
MODEL = @lib.Model()
MIXTURE_OR_TASK_NAME = 'kjv'
TASK_FEATURE_LENGTHS = {'targets': %LENGTH}
TRAIN_STEPS = 100
MODEL_DIR = 'runs/kjv'
"""


@pytest.fixture(scope='module', autouse=True)
def _library(folder_of_modules):
  (folder_of_modules / 'checks_base.py').write_text(_BASE)
  (folder_of_modules / 'checks_library.py').write_text(_LIBRARY)


def _check(*lines):
  gin.clear_config()
  gin.parse_config('\n'.join([_RUN, *lines]))
  before = gin.config_str()
  gin.finalize()
  assert gin.config_str() == before


def _problem(*lines):
  with pytest.raises(ConfigError) as caught:
    _check(*lines)
  return str(caught.value)


def test_accepts_a_t5x_like_config():
  _check(_SET, "train/lib.DataSettings.split = 'train[:90%]'")
  assert gin.config_is_locked()


def test_refuses_a_macro_that_nothing_uses():
  problem = _problem(_SET, 'BATCH_SZIE = 8')
  assert problem.count('\n') == 0
  assert 'BATCH_SZIE' in problem and 'did you mean BATCH_SIZE?' in problem


@pytest.mark.parametrize(
  ('settings', 'macro', 'instead'),
  [
    (['lib.train.total_steps = 3'], 'TRAIN_STEPS', '--gin.TRAIN_STEPS=3'),
    (["lib.train.model_dir = 'x'"], 'MODEL_DIR', r'--gin.MODEL_DIR=\"x\"'),
    (["TASK_FEATURE_LENGTHS = {'targets': 3}"], 'LENGTH', '--gin.LENGTH=...'),
    (['lib.train.model = @lib.Base()'], 'MODEL', '--gin.MODEL=...'),
    (
      ['train/lib.DataSettings.batch_size = 3', 'train_eval/lib.DataSettings.batch_size = 4'],
      'BATCH_SIZE',
      '--gin.BATCH_SIZE=3',
    ),
  ],
)
def test_names_what_has_taken_the_place_of_a_macro_s_users(settings, macro, instead):
  problem = _problem(_SET, *settings)
  assert problem.startswith(f'{macro} is set but no setting uses %{macro}, whose place ')
  for setting in settings:
    key = setting.replace('lib.', '').partition(' = ')[0]
    assert f'{key} = ' in problem
  assert problem.endswith(f'set {macro} itself: {instead}')
  # Nothing of it is left for the next configuration.
  assert 'whose place' not in _problem(_SET, f'{macro}S = 1')


@pytest.mark.parametrize(
  ('setting', 'instead'),
  [
    ('batch_size = 3', 'set BATCH_SIZE itself: --gin.BATCH_SIZE=3'),
    ('shuffle = 1', 'set that'),
  ],
)
def test_refuses_a_setting_that_inner_scopes_hide(setting, instead):
  problem = _problem(_SET, f'lib.DataSettings.{setting}').split('\n')[0]
  name = setting.partition(' = ')[0]
  assert problem.startswith(f'DataSettings.{setting} changes nothing')
  assert f'train/DataSettings.{name}, train_eval/DataSettings.{name} hold' in problem
  assert problem.endswith(instead)


@pytest.mark.parametrize(
  'lines',
  [
    ["lib.DataSettings.split = 'train'"],  # train/ has none of its own.
    ['lib.DataSettings.batch_size = 3', 'lib.Model.anything = @lib.DataSettings()'],
    ['lib.train.checkpoint = @a/b/lib.Plain()', 'lib.Plain.width = 1', 'a/lib.Plain.other = 2'],
    # A default.
    ['lib.train.checkpoint = @a/lib.Plain()', 'lib.Plain.width = 1', 'a/lib.Plain.width = 2'],
  ],
)
def test_a_setting_that_some_scope_takes_is_used(lines):
  _check(_SET, *lines)


def test_macros_may_use_each_other():
  _check(_SET, 'TRAIN_STEPS = %LONG', 'LONG = %LONGER', 'LONGER = 7')


def test_refuses_a_macro_that_nothing_defines():
  problem = _problem(_SET, 'TRAIN_STEPS = %STEPS', 'STPES = 3')
  assert '%STEPS is used by TRAIN_STEPS' in problem and 'did you mean STPES?' in problem
  assert '--gin.STEPS=' in problem


def test_names_every_required_macro_that_is_not_set():
  problem = _problem('MODEL = @lib.Model()', "MODEL_DIR = 'runs'")
  assert 'MIXTURE_OR_TASK_NAME, TASK_FEATURE_LENGTHS, TRAIN_STEPS' in problem
  assert 'MODEL_DIR' not in problem
  assert '--gin.MIXTURE_OR_TASK_NAME=' in problem


def test_names_a_required_setting_that_is_not_set():
  problem = _problem(_SET, 'train_eval/lib.DataSettings.split = %gin.REQUIRED')
  assert '--gin.train_eval/DataSettings.split=' in problem


def test_reports_all_problems_at_once():
  problem = _problem(_SET, 'BATCH_SZIE = 8', 'lib.Model.block_len = 1.5')
  assert len(problem.split('\n')) == 2


def test_refuses_a_scope_that_no_reference_uses():
  problem = _problem(_SET, 'trian/lib.DataSettings.batch_size = 8')
  assert 'trian/DataSettings.batch_size' in problem and 'did you mean train?' in problem
  assert 'train, train_eval' in problem


def test_an_outer_scope_reaches_an_inner_reference():
  nested = 'lib.train.checkpoint = @outer/inner/lib.Plain()'
  _check(_SET, nested, 'outer/lib.Plain.width = 1', 'outer/inner/lib.Plain.width = 2')
  assert 'inner/Plain.width' in _problem(_SET, nested, 'inner/lib.Plain.width = 2')


def test_names_the_macro_and_the_setting_of_a_wrong_value():
  problem = _problem(_SET, 'TRAIN_STEPS = %LONG', "LONG = '100'")
  assert 'train.total_steps' in problem
  assert 'TRAIN_STEPS = %LONG' in problem and "LONG = '100'" in problem
  assert 'accepts int, not str' in problem


def test_looks_at_macros_inside_containers():
  problem = _problem(_SET, "LENGTH = '512'")
  assert 'train/DataSettings.task_feature_lengths' in problem
  assert 'train_eval/DataSettings.task_feature_lengths' in problem
  assert "LENGTH = '512'" in problem and 'Mapping[str, int]' in problem


@pytest.mark.parametrize(
  ('setting', 'accepted'),
  [
    ('Model.block_len = 1.5', 'int'),
    ('Model.block_len = 1e3', 'int (1000)'),
    ('Model.block_len = True', 'int'),
    ('Model.block_len = None', 'int'),
    ('Model.block_len = @lib.schedule', 'add () to call it'),
    ('Model.inherited = "1"', 'int'),
    ('Model.scan_layers = 1', 'bool (True or False)'),
    ('Model.scan_layers = "True"', 'bool (True or False)'),
    ('Model.rate = "0.1"', 'float'),
    ('Model.kind = "vqq"', "Kind (vq, quadratic), not str 'vqq'; did you mean vq?"),
    ('Model.color = 1', 'Color (RED)'),
    ('Model.other = "vqq"', 'Kind (vq, quadratic) or None'),
    ('Model.reduction = "matmull"', 'did you mean matmul?'),
    ('Model.sizes = 3', 'Sequence[int]'),
    ('Model.sizes = [1, "2"]', 'Sequence[int]'),
    ('Model.pair = (1, 2, 3)', 'tuple[int, int]'),
    ('Model.names = "a"', 'list[str] or None'),
    ('Model.path = 3', 'str or Sequence[str]'),
    ('Model.steps = "1"', 'accepts int'),
    ('Model.depth = 1.5', 'accepts int'),
    ('Model.loose = "1"', 'int'),
    ('Plain.width = "1"', 'int'),
    ('train.model_dir = 3', 'str'),
    ('train.random_seed = "1"', 'int or None'),
    ('schedule.base = "1"', 'float'),
  ],
)
def test_refuses_a_wrong_type(setting, accepted):
  problem = _problem(_SET.replace('%MODEL_DIR', '"x"'), f'lib.{setting}', *_keep(setting))
  assert setting.split(' = ')[0] in problem and accepted in problem


def _keep(setting):
  """Overriding the only use of a macro must not add a second problem."""
  macro = {'train.model_dir': 'MODEL_DIR', 'train.random_seed': 'RANDOM_SEED'}
  name = macro.get(setting.split(' = ')[0])
  return [f'lib.Model.anything = %{name}'] if name else []


@pytest.mark.parametrize(
  'setting',
  [
    'Model.rate = 1',
    'Model.kind = "quadratic"',
    'Model.reduction = "matmul"',
    'Model.sizes = [1, 2]',
    'Model.sizes = (1, 2)',
    'Model.pair = [1, 2]',
    'Model.names = None',
    'Model.names = ["a"]',
    'Model.path = None',
    'Model.path = ["a", "b"]',
    'Model.loose = None',
    'Model.missing = 3',
    'Model.init = @lib.schedule',
    'Model.init = 3',
    'Model.anything = {"a": [1]}',
    'Model.block_len = @lib.schedule()',
    'Plain.width = 1',
    'Plain.other = "goes into **kwargs"',
    'train.train_eval_dataset_cfg = None',
    'train.learning_rate = @lib.schedule',
  ],
)
def test_accepts_a_right_or_an_unclear_type(setting):
  keep = 'lib.Model.anything = [@train_eval/lib.DataSettings(), 1]'
  _check(_SET, keep, f'lib.{setting}')


@pytest.mark.parametrize('module', ['t5x.utils', '__main__'])
def test_in_t5x_none_has_any_type(monkeypatch, module):
  import checks_library

  monkeypatch.setattr(checks_library.train, '__module__', module)
  _check(_SET, 'lib.train.model_dir = None', *_keep('train.model_dir = None'))
  assert 'accepts str, not int' in _problem(_SET, 'lib.train.model_dir = 1')


def test_constants_are_looked_up():
  gin.constant('checks.STEPS', 'ten')
  try:
    assert "accepts int, not str 'ten'" in _problem(_SET, 'lib.Model.block_len = %checks.STEPS')
  finally:
    gin.clear_config(clear_constants=True)


def test_a_name_is_long_enough_to_be_the_only_one():
  wrong = "lib.Twin.width = '1'"
  assert _problem(_SET, wrong).startswith("Twin.width = '1'")
  gin.external_configurable(
    type('Twin', (), {'__init__': lambda self, width: None}), module='other'
  )
  assert _problem(_SET, wrong).startswith("lib.Twin.width = '1'")


def test_circular_macros_end():
  _check(_SET, 'TRAIN_STEPS = %LONG', 'LONG = %TRAIN_STEPS')


def test_files_for_t5x_s_programs_bring_the_checks_along():
  files = (pathlib.Path(__file__).parents[2] / 'gin' / 'runs').glob('*.gin')
  texts = [text for path in files if "include 't5x/" in (text := path.read_text())]
  assert len(texts) == 4
  assert all('from tvq_t5x.t5x_adapter import paths\n' in text for text in texts)
  code = """
import gin
from tvq_t5x.t5x_adapter import paths
gin.parse_config('BATCH_SZIE = 8')
gin.finalize()
"""
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert 'ConfigError: BATCH_SZIE is set but no setting uses %BATCH_SZIE' in done.stderr
