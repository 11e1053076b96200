"""Imports of libraries in C++ without what they log meanwhile."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from absl import logging

from tvq_t5x.common import files

# TensorFlow logs like this before it reads TF_CPP_MIN_LOG_LEVEL; that there is no GPU is no error.
_LOG_LINE = (
  '^(WARNING: All log messages before absl::InitializeLog|[IW][0-9]{4} |E.*failed call to cuInit)'
)


@contextlib.contextmanager
def imports() -> Iterator[None]:
  """Leaves out what C++ libraries log while they load; see `calls`."""
  files.do_without_temporary_folder()
  with contextlib.nullcontext() if 'tensorflow' in sys.modules else calls():
    yield


@contextlib.contextmanager
def calls() -> Iterator[None]:
  """Leaves out what C++ libraries log meanwhile, errors apart; --verbosity=1 shows all.

  Another process leaves it out: if this one is aborted, its last words are still seen.
  """
  files.do_without_temporary_folder()
  grep = shutil.which('grep')
  if logging.get_verbosity() > logging.INFO or not grep:
    yield
    return
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '1')
  sys.stderr.flush()
  terminal = os.dup(2)
  # In a session of its own it outlives Ctrl-C, and this process can still write to it.
  command = [grep, '-vE', _LOG_LINE]
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=terminal, start_new_session=True
  ) as others:
    assert others.stdin is not None
    os.dup2(others.stdin.fileno(), 2)
    try:
      yield
    finally:
      sys.stderr.flush()
      os.dup2(terminal, 2)
      os.close(terminal)
