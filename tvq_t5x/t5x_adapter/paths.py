"""Paths as Orbax takes them."""

import os


def absolute(path: str) -> str:
  """The absolute path of a folder; one in a bucket, as 'gs://bucket/folder', stays as it is."""
  return path if '://' in path else os.path.abspath(path)
