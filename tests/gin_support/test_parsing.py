"""Where gin files are found, what is said of a wrong one, and how arguments are rewritten."""

import os

import gin
import pytest

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import parsing

pytestmark = pytest.mark.quick

_LIBRARY = """
import dataclasses


@dataclasses.dataclass
class Almanac:
  batch_size: int = 1
  shuffle: bool = True


def train(dataset: Almanac, model_dir: str = '', steps: int = 1):
  del dataset, model_dir, steps
"""

_RUN = """
from __gin__ import dynamic_registration

from ginfakes import data

MODEL_DIR = %gin.REQUIRED
STEPS = 10

data.train:
  dataset = @train/data.Almanac()
  model_dir = %MODEL_DIR
  steps = %STEPS

train/data.Almanac:
  batch_size = 8
"""

_DIR = ["MODEL_DIR = 'runs'"]


@pytest.fixture(scope='module', autouse=True)
def _library(folder_of_modules):
  fakes = folder_of_modules / 'ginfakes'
  fakes.mkdir()
  (fakes / '__init__.py').write_text('')
  (fakes / 'data.py').write_text(_LIBRARY)
  (fakes / 'broken.py').write_text('raise ValueError("the module itself is broken")')
  (fakes / 'packed.gin').write_text('PACKED = 1')


@pytest.fixture
def home(tmp_path, monkeypatch):
  """The folder that holds `gin/`; the working directory is another one."""
  holder = tmp_path / 'holder'
  _write(holder / 'gin' / 'run.gin', _RUN)
  (tmp_path / 'work').mkdir()
  monkeypatch.chdir(tmp_path / 'work')
  monkeypatch.setattr(parsing, 'gin_root', lambda: str(holder / 'gin'))
  return holder


def _write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return str(path)


def _problem(files, bindings=(), search_paths=()):
  with pytest.raises(ConfigError) as caught:
    parsing.parse_gin(files, bindings, search_paths)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def _steps():
  return gin.query_parameter('STEPS/gin.macro.value')


def _set_steps(path, steps):
  return _write(path, f"{_RUN}\nSTEPS = {steps}\nMODEL_DIR = 'runs'")


def test_gin_root_is_this_projects():
  assert os.path.isdir(parsing.gin_root())
  assert not os.path.exists(os.path.join(parsing.gin_root(), '__init__.py'))


def test_gin_root_of_a_wheel_is_inside_the_package(tmp_path, monkeypatch):
  monkeypatch.setattr(parsing, '_PACKAGE', str(tmp_path / 'tvq_t5x'))
  assert parsing.gin_root() == str(tmp_path / 'gin')
  (tmp_path / 'tvq_t5x' / 'gin').mkdir(parents=True)
  assert parsing.gin_root() == str(tmp_path / 'tvq_t5x' / 'gin')


def test_our_files_are_found_from_any_folder(home):
  parsing.parse_gin(['gin/run.gin'], _DIR)
  assert _steps() == 10


def test_folders_are_searched_in_order(home, tmp_path):
  (tmp_path / 'extra').mkdir()
  last = home / 'gin' / 'x.gin'
  extra = tmp_path / 'extra' / 'gin' / 'x.gin'
  work = tmp_path / 'work' / 'gin' / 'x.gin'
  standalone = home / 'gin' / 'standalone' / 'gin' / 'x.gin'
  for steps, path in enumerate([last, extra, work, standalone]):
    _set_steps(path, steps)
    parsing.parse_gin(['gin/x.gin'], [], [str(tmp_path / 'extra')])
    assert _steps() == steps


def test_includes_prefer_the_standalone_runner(home, tmp_path):
  _set_steps(tmp_path / 'work' / 'gin' / 'runs' / 'pretrain.gin', 1)
  _set_steps(home / 'gin' / 'standalone' / 'gin' / 'runs' / 'pretrain.gin', 2)
  mine = _write(tmp_path / 'work' / 'mine.gin', "include 'gin/runs/pretrain.gin'")
  parsing.parse_gin(['mine.gin'], [])
  assert _steps() == 2
  gin.clear_config()
  gin.parse_config_file(mine)  # As T5X does.
  assert _steps() == 1


def test_includes_come_from_packages_too(home, tmp_path):
  path = _write(tmp_path / 'y.gin', "include 'ginfakes/packed.gin'\nSTEPS = %PACKED")
  parsing.parse_gin(['gin/run.gin', path], _DIR)
  assert gin.query_parameter('PACKED/gin.macro.value') == 1


def test_a_folder_that_could_be_a_package_does_not_end_the_search(home, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path / 'work'))
  # Python takes it for a package without __init__.py.
  (tmp_path / 'work' / 'loose').mkdir()
  _set_steps(tmp_path / 'extra' / 'loose' / 'x.gin', 5)
  parsing.parse_gin(['loose/x.gin'], [], [str(tmp_path / 'extra')])
  assert _steps() == 5


def test_gins_search_path_is_restored(home):
  before = gin.config._LOCATION_PREFIXES, gin.config._FILE_READERS
  parsing.parse_gin(['gin/run.gin'], _DIR)
  _problem(['gin/run.gin'], ['NOPE.x = 1'])
  assert (gin.config._LOCATION_PREFIXES, gin.config._FILE_READERS) == before


def test_nothing_is_logged_about_folders_without_the_file(home, caplog):
  parsing.parse_gin(['gin/run.gin'], _DIR)
  assert 'not found' not in caplog.text


def test_later_files_and_bindings_hold(home, tmp_path):
  more = _write(tmp_path / 'more.gin', 'STEPS = 20')
  parsing.parse_gin(['gin/run.gin', more], _DIR)
  assert _steps() == 20
  parsing.parse_gin(['gin/run.gin', more], [*_DIR, 'STEPS = 30'])
  assert _steps() == 30
  assert gin.config_is_locked()


def test_nothing_is_left_of_the_previous_configuration(home):
  parsing.parse_gin(['gin/run.gin'], [*_DIR, 'train/data.Almanac.shuffle = False'])
  parsing.parse_gin(['gin/run.gin'], _DIR)
  assert 'shuffle' not in parsing.config_str()


def test_config_str_can_be_parsed_again(home, tmp_path):
  parsing.parse_gin(['gin/run.gin'], _DIR)
  text = parsing.config_str()
  assert "MODEL_DIR = 'runs'" in text and 'batch_size = 8' in text
  parsing.parse_gin([_write(tmp_path / 'config.gin', text)], [])
  assert parsing.config_str() == text


def test_a_missing_file_is_named_with_the_flag_and_the_folders(home, tmp_path):
  (tmp_path / 'extra').mkdir()
  problem = _problem(['gin/rnu.gin'], (), [str(tmp_path / 'extra')])
  assert '--gin_file=gin/rnu.gin' in problem and 'did you mean gin/run.gin?' in problem
  for folder in [home / 'gin' / 'standalone', tmp_path / 'work', tmp_path / 'extra', home]:
    assert str(folder) in problem


def test_a_missing_include_is_named_with_its_line(home, tmp_path):
  path = _write(tmp_path / 'x.gin', "STEPS = 1\ninclude 'gin/rnu.gin'")
  problem = _problem([path])
  assert f'{path}, line 2' in problem and 'gin/rnu.gin' in problem
  assert 'did you mean gin/run.gin?' in problem and str(tmp_path / 'work') in problem


@pytest.mark.parametrize(
  ('line', 'parts'),
  [
    ('data.Almanac.batch_sze = 1', ['batch_sze', 'batch_size?', 'accepted: batch_size, shuffle']),
    ('data.Almnac.batch_size = 1', ['Almnac', 'did you mean Almanac']),
    ('data.train.dataset = @data.Almnac()', ['Almnac', 'did you mean Almanac']),
    ('dta.Almanac.batch_size = 1', ['dta', 'did you mean data']),
    ('from ginfakes import dta', ['ginfakes.dta', 'did you mean ginfakes.data']),
    ('from nowhere_at_all import x', ['nowhere_at_all']),
    ('STEPS = ten', ['STEPS = ten']),
    ('STEPS 10', ['STEPS 10']),
  ],
)
def test_what_gin_refuses_is_named_with_file_and_line(home, tmp_path, line, parts):
  head = 'from __gin__ import dynamic_registration\nfrom ginfakes import data\n'
  path = _write(tmp_path / 'x.gin', f'{head}{line}\n')
  problem = _problem([path])
  for part in [f'{path}, line 3', line, *parts]:
    assert part in problem


def test_an_unclosed_bracket_is_refused(home, tmp_path):
  path = _write(tmp_path / 'x.gin', 'STEPS = {1: \n')
  assert path in _problem([path])


@pytest.mark.parametrize(
  ('binding', 'parts'),
  [
    ('train/data.Almnac.batch_size = 1', ['data.Almnac', 'did you mean data.Almanac?']),
    ('data.Almanac.batch_sze = 1', ['batch_sze', 'did you mean batch_size?']),
    ("STEPS = {'a' 1}", ['STEPS']),
  ],
)
def test_what_gin_refuses_on_the_command_line_is_named(home, binding, parts):
  problem = _problem(['gin/run.gin'], [*_DIR, binding])
  assert all(part in problem for part in ['command line', *parts])


def test_a_setting_of_a_call_is_no_flag(home):
  assert _problem(['gin/run.gin'], ['--gin.STEPS=3']).startswith('--gin.STEPS=3: give a setting as')


def test_errors_of_imported_modules_are_left_alone(home, tmp_path):
  head = 'from __gin__ import dynamic_registration\n'
  path = _write(tmp_path / 'x.gin', f'{head}from ginfakes import broken\n')
  with pytest.raises(ValueError, match='the module itself is broken') as caught:
    parsing.parse_gin([path], [])
  assert not isinstance(caught.value, ConfigError)


def test_checks_run_after_parsing(home):
  assert 'MODEL_DIR' in _problem(['gin/run.gin'])
  assert 'did you mean STEPS?' in _problem(['gin/run.gin'], [*_DIR, 'STPES = 3'])
  assert 'accepts int' in _problem(['gin/run.gin'], [*_DIR, "STEPS = '3'"])


def test_gin_arguments_become_bindings():
  args = ['prog', '--gin_file=a.gin', '--gin.STEPS=10', '--gin.train/data.Almanac.x={"a": "b=c"}']
  assert parsing.rewrite_gin_args(args) == [
    'prog',
    '--gin_file=a.gin',
    '--gin_bindings=STEPS = 10',
    '--gin_bindings=train/data.Almanac.x = {"a": "b=c"}',
  ]


@pytest.mark.parametrize(
  'value', ['"runs/kjv"', "'runs/kjv'", '-1', '1e-3', 'None', 'True', '%STEPS', '@f()', '[1]']
)
def test_gin_values_are_kept(value):
  assert parsing.rewrite_gin_args([f'--gin.X={value}']) == [f'--gin_bindings=X = {value}']


@pytest.mark.parametrize('text', ['runs/kjv', '/tmp/a b', 'gs://bucket/x', 'kjv', '2024x', '~/x'])
def test_text_without_quotes_is_refused_with_the_right_quoting(text, home):
  with pytest.raises(ConfigError) as caught:
    parsing.rewrite_gin_args([f'--gin.MODEL_DIR={text}'])
  assert '\n' not in str(caught.value)
  assert f'--gin.MODEL_DIR=\\"{text}\\"' in str(caught.value)
  assert f'--gin.MODEL_DIR=\\"{text}\\"' in _problem(['gin/run.gin'], [f'MODEL_DIR={text}'])


@pytest.mark.parametrize(
  ('arg', 'part'),
  [
    ('--gin.STEPS', '--gin.STEPS=VALUE'),
    ('--gin.STEPS=', '--gin.STEPS='),
    ('--gin.LENGTHS={targets:', "'--gin.LENGTHS=VALUE'"),
    ('--gin.SHUFFLE=true', '--gin.SHUFFLE=True'),
  ],
)
def test_other_wrong_arguments_are_refused(arg, part):
  with pytest.raises(ConfigError) as caught:
    parsing.rewrite_gin_args([arg])
  assert part in str(caught.value)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
  path = tmp_path / 'bom.gin'
  path.write_bytes(('\ufeff' + _RUN + "# caf\xe9\r\nMODEL_DIR = 'x'\r\n").encode())
  parsing.parse_gin([str(path)], [])
  assert gin.query_parameter('MODEL_DIR/macro.value') == 'x'


@pytest.mark.parametrize('content', [b'STEPS = 1\n# caf\xe9', 'STEPS = 1\n'.encode('utf-16')])
def test_a_file_in_another_encoding_is_refused(tmp_path, content):
  (tmp_path / 'other.gin').write_bytes(content)
  (tmp_path / 'run.gin').write_text(f"include '{tmp_path / 'other.gin'}'")
  for name in ('other.gin', 'run.gin'):
    with pytest.raises(ConfigError) as caught:
      parsing.parse_gin([str(tmp_path / name)], _DIR)
    assert f'{tmp_path / "other.gin"}, line ' in str(caught.value)
    assert 'is no UTF-8; save it as UTF-8' in str(caught.value)
