"""Options of the whole test suite."""

import pathlib


def pytest_addoption(parser):
  parser.addoption(
    '--golden-dir',
    default=str(pathlib.Path(__file__).parent / 'golden'),
    help='Folder of .npz files from the reference implementation to check against.',
  )
