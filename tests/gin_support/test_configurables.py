"""Functions that Python calls and gin configures, and macros that are asked for."""

import importlib

import gin
import pytest

from tvq_t5x.gin_support import configurables

pytestmark = pytest.mark.usefixtures('cleared_gin')

_MODULE = """
from tvq_t5x.gin_support.configurables import configurable

@configurable
def answer(value=0):
  return value
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / 'module_with_a_configurable.py').write_text(_MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  return importlib.import_module('module_with_a_configurable')


def test_gin_sets_what_python_calls_and_what_a_reload_calls(module):
  assert module.answer() == 0
  gin.bind_parameter('module_with_a_configurable.answer.value', 42)
  assert module.answer() == 42
  module = importlib.reload(module)
  assert module.answer() == 42
  gin.bind_parameter('module_with_a_configurable.answer.value', 43)
  assert module.answer() == 43


def test_a_module_may_be_imported_when_the_configuration_is_locked():
  gin.finalize()
  assert gin.config_is_locked()

  @configurables.configurable
  def late(value=1):
    return value

  assert late() == 1
  assert gin.config_is_locked()


def test_macros():
  assert not configurables.has_macro('A_MACRO_OF_A_TEST')
  gin.parse_config('A_MACRO_OF_A_TEST = None')
  assert configurables.has_macro('A_MACRO_OF_A_TEST')
