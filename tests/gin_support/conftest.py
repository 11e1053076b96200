"""Modules that gin files name, and an empty gin configuration for every test."""

import sys

import gin
import pytest


@pytest.fixture(scope='module')
def folder_of_modules(tmp_path_factory):
  """A folder in which Python looks for modules first."""
  folder = tmp_path_factory.mktemp('library')
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))


@pytest.fixture(autouse=True)
def _empty_gin():
  gin.clear_config()
  yield
  gin.clear_config()
