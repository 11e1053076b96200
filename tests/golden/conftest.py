"""Parametrizes each test over the golden files that hold what it checks."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from case import GoldenCase  # noqa: E402


def pytest_generate_tests(metafunc):
  needs = getattr(metafunc.function, 'needs', None)
  if needs is None:
    return
  folder = pathlib.Path(metafunc.config.getoption('--golden-dir'))
  files = sorted(folder.glob('*.npz'))
  if not files:
    raise FileNotFoundError(f'--golden-dir={folder} holds no .npz file.')
  cases = {path.stem: GoldenCase(path) for path in files}
  chosen = {name: case for name, case in cases.items() if case.has(needs)}
  metafunc.parametrize('case', chosen.values(), ids=chosen.keys())
