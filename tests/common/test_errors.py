"""Messages made of their parts."""

import copy
import pickle

import pytest

from tvq_t5x.common import errors
from tvq_t5x.common.errors import ConfigError


def test_a_setting_its_value_and_what_is_accepted():
  error = ConfigError('DatasetConfig.batch_size', 0, 'a whole number of at least 1')
  assert str(error) == (
    'DatasetConfig.batch_size = 0 is not accepted: give a whole number of at least 1.'
  )
  assert (error.setting, error.value) == ('DatasetConfig.batch_size', 0)
  assert error.accepted == 'a whole number of at least 1'


def test_another_problem():
  error = ConfigError('a.b', 'x', "'y'", problem='is no z')
  assert str(error) == "a.b = 'x' is no z: give 'y'."


def test_a_whole_message():
  error = ConfigError('--prompt: give one.')
  assert str(error) == '--prompt: give one.'
  assert error.setting is None


def test_copies_say_the_same():
  error = ConfigError('a.b', None, '1 or 2')
  for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
    assert str(other) == str(error) and other.setting == 'a.b' and other.accepted == '1 or 2'


def test_a_setting_by_the_name_of_what_it_was_set_by():
  with pytest.raises(ConfigError, match=r"^--split = 'x' is odd: give 'y'\.$"):
    with errors.renamed('DatasetConfig.split', '--split'):
      raise ConfigError('DatasetConfig.split', 'x', "'y'", problem='is odd')
  for other in (ConfigError('DatasetConfig.seed', 'x', 'a number'), ConfigError('text')):
    with pytest.raises(ConfigError) as error, errors.renamed('DatasetConfig.split', '--split'):
      raise other
    assert error.value is other
