"""What setup.py puts into a wheel; nothing is built."""

import fnmatch
import pathlib
import runpy

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement

pytestmark = pytest.mark.quick

_ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(name='settings')
def _settings(monkeypatch):
  """What setup.py says."""
  found = {}
  monkeypatch.chdir(_ROOT)
  monkeypatch.setattr(setuptools, 'setup', lambda **settings: found.update(settings))
  runpy.run_path(str(_ROOT / 'setup.py'))
  return found


def _package(path):
  """The package that a file of the checkout is in."""
  folder = path.relative_to(_ROOT).parent
  inside = folder if folder.parts[0] == 'tvq_t5x' else pathlib.Path('tvq_t5x') / folder
  return '.'.join(inside.parts)


def test_every_gin_file_is_in_a_wheel(settings):
  files = list((_ROOT / 'gin').rglob('*.gin'))
  assert files
  for path in files:
    patterns = settings['package_data'].get(_package(path), [])
    assert any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), path
    assert _package(path) in settings['packages'], path


@pytest.mark.parametrize('folder', ['tvq_t5x', 'tasks'])
def test_every_module_is_in_a_wheel(settings, folder):
  files = list((_ROOT / folder).rglob('*.py'))
  assert files
  for path in files:
    assert _package(path) in settings['packages'], path


def test_folders_beside_the_package_come_into_it(settings):
  assert settings['package_dir'] == {'tvq_t5x.gin': 'gin', 'tvq_t5x.tasks': 'tasks'}


def test_license_and_types_come_into_it(settings):
  for name in settings['license_files']:
    assert (_ROOT / name).is_file(), name
  (typed,) = settings['package_data']['tvq_t5x']
  assert (_ROOT / 'tvq_t5x' / typed).is_file()


def test_hooks_are_lines_of_the_checks():
  (local,) = yaml.safe_load((_ROOT / '.pre-commit-config.yaml').read_text())['repos']
  checks = (_ROOT / '.ci' / 'run').read_text().splitlines()
  assert {hook['entry'] for hook in local['hooks']} <= set(checks)


def test_nothing_else_is_in_a_wheel(settings):
  assert {name.split('.')[0] for name in settings['packages']} == {'tvq_t5x'}


def test_the_citation_is_of_this_version(settings):
  cited = yaml.safe_load((_ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
  assert cited['version'] == settings['version']
  assert cited['license'] == settings['license']
  assert [author['name'] for author in cited['authors']] == [settings['author']]


def test_ci_can_build_the_site_and_run_the_notebook(settings):
  extras = settings['extras_require']
  assert set(extras['docs']) <= set(extras['test'])
  assert {'ipykernel', 'nbclient'} <= {x.partition('>')[0] for x in extras['test']}


def test_versions_that_the_tests_had_are_those_that_are_asked_for(settings):
  lines = (_ROOT / 'constraints.txt').read_text().splitlines()[1:]
  had = {name.lower().replace('_', '-'): found for name, found in (x.split('==') for x in lines)}
  for text in [*settings['install_requires'], *settings['extras_require']['test']]:
    requirement = Requirement(text)
    found = had[requirement.name.lower().replace('_', '-')]
    assert found in requirement.specifier, text
