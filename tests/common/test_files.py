"""Paths as users give them."""

import pathlib

import pytest

from tvq_t5x.common import files
from tvq_t5x.common.errors import ConfigError

pytestmark = pytest.mark.quick


def test_the_home_folder_is_filled_in(monkeypatch):
  monkeypatch.setenv('HOME', '/home/of/me')
  assert files.absolute('~/runs', 'x') == pathlib.Path('/home/of/me/runs')
  assert files.absolute('~', 'x') == pathlib.Path('/home/of/me')


def test_what_means_nothing_to_us_stays_as_it_is(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert files.absolute('$HOME/a~', 'x') == tmp_path / '$HOME' / 'a~'
  files.check_name('/a b/{c}/$HOME/%20#,]/日本', 'x')


@pytest.mark.parametrize('name', ['/a[1]', '/b/c*/d', '/what?', 'gs://b/[x]', '/a\\b', '/a\0b'])
def test_names_that_are_patterns_are_refused(name):
  with pytest.raises(ConfigError, match='^train.model_dir = 7: .* could not be read again'):
    files.check_name(name, 'train.model_dir = 7')
