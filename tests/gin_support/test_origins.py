"""Messages say which macro or binding sets the settings that they name."""

import sys

import gin
import pytest

from tvq_t5x.common.errors import ConfigError
from tvq_t5x.gin_support import origins, parsing

_LIBRARY = """
import dataclasses
import typing


@dataclasses.dataclass
class Feed:
  size: int = 1
  lengths: typing.Any = None
  name: str = ''


class Grid:
  def __init__(self, parts: int = 1):
    pass


class ThatGrid(Grid):
  def __init__(self, parts: int = 1):
    pass


def fit(train_data, eval_data, mesh, steps: int = 1, rate: float = 0.1):
  raise AssertionError('Nothing is built.')
"""

_RUN = """
from __gin__ import dynamic_registration

import origins_library as feeds

SIZE = 8
LENGTH = 64
LENGTHS = {'targets': %LENGTH}
STEPS = %MANY
MANY = 100
NAME = 'of a file.txt'
PARTS = 2

feeds.fit:
  train_data = @train/feeds.Feed()
  eval_data = @eval/feeds.Feed()
  mesh = @feeds.ThatGrid()
  steps = %STEPS
  rate = 0.5

feeds.Feed.lengths = %LENGTHS
train/feeds.Feed:
  size = %SIZE
  name = %NAME
eval/feeds.Feed:
  size = 3
  name = %NAME
feeds.ThatGrid.parts = %PARTS
"""


@pytest.fixture(scope='module', autouse=True)
def _library(tmp_path_factory):
  folder = tmp_path_factory.mktemp('library')
  (folder / 'origins_library.py').write_text(_LIBRARY)
  sys.path.insert(0, str(folder))
  yield
  sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def _configured(_library):
  gin.clear_config()
  gin.parse_config(_RUN)
  gin.finalize()
  yield
  gin.clear_config()


@pytest.mark.parametrize(
  ('message', 'expected'),
  [
    ('Feed.size = 8: give more.', 'Feed.size = 8 (macro SIZE): give more.'),
    ('Feed.size = 8.', 'Feed.size = 8 (macro SIZE).'),
    # Of a scope, without a macro.
    ('Feed.size = 3: give more.', 'Feed.size = 3 (eval/Feed.size): give more.'),
    # In all scopes, and in none.
    ("Feed.name = 'of a file.txt', no", "Feed.name = 'of a file.txt' (macro NAME), no"),
    ("Feed.lengths = {'targets': 64} is", "Feed.lengths = {'targets': 64} (macro LENGTHS) is"),
    # The one to set, of macros that refer to each other.
    ('fit.steps = 100 is', 'fit.steps = 100 (macro STEPS) is'),
    # The message has its name already.
    ('fit.rate = 0.5 is', 'fit.rate = 0.5 is'),
    # Named like what it is a kind of, or like what another engine calls it.
    ('another Grid.parts.', 'another Grid.parts (macro PARTS).'),
    ('run.steps = 100 is', 'run.steps = 100 (macro STEPS) is'),
    ('run.rate = 0.5 is', 'run.rate = 0.5 (fit.rate) is'),
    # Another value comes from somewhere else.
    ('Feed.size = 80: give', 'Feed.size = 80: give'),
    ('fit.rate = 0.55 is', 'fit.rate = 0.55 is'),
    ('run.rate = 0.5.', 'run.rate = 0.5 (fit.rate).'),
    # No settings of this configuration.
    ('/data/Feed.size and runs/fit.steps', '/data/Feed.size and runs/fit.steps'),
    ('--gin.STEPS=... in config.gin, e.g. 3.5', '--gin.STEPS=... in config.gin, e.g. 3.5'),
    # Each once.
    (
      'fit.steps = 100 and Feed.size = 8: a multiple of Feed.size = 8.',
      'fit.steps = 100 (macro STEPS) and Feed.size = 8 (macro SIZE): a multiple of Feed.size = 8.',
    ),
  ],
)
def test_what_sets_a_setting_follows_it(message, expected):
  assert origins.with_origins(message) == expected


def test_every_place_of_a_value():
  gin.clear_config()
  gin.parse_config([_RUN, 'eval/feeds.Feed.size = 8'])
  gin.finalize()
  assert origins.with_origins('Feed.size = 8') == 'Feed.size = 8 (macro SIZE, eval/Feed.size)'


def test_without_a_configuration_messages_stay_as_they_are():
  gin.clear_config()
  assert origins.with_origins('Feed.size = 8') == 'Feed.size = 8'
  gin.parse_config(_RUN)
  assert origins.with_origins('Feed.size = 8') == 'Feed.size = 8'


def test_errors_on_their_way():
  with pytest.raises(ConfigError) as caught, origins.added_to_errors():
    raise ConfigError('Feed.size', 8, 'more')
  assert str(caught.value) == 'Feed.size = 8 (macro SIZE) is not accepted: give more.'
  assert caught.value.setting == 'Feed.size'


def test_shown_messages_have_lost_the_way_through_gin():
  error = ConfigError("Feed.size = 8: more.\n  In call to configurable 'Feed' (<class>)")
  assert parsing.message(error) == 'Feed.size = 8 (macro SIZE): more.'
