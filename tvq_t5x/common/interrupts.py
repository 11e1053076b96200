"""Ctrl-C while a command has nothing yet, or no longer, that it would have to end well."""

import os
import re
import signal
import sys
from types import FrameType


def end_at_once() -> None:
  """Makes Ctrl-C end this process with a line and exit code 130, in place of a traceback.

  A signal that is ignored stays ignored, as the parent of a job in the background wants it.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
  """Undoes `end_at_once`: Ctrl-C raises KeyboardInterrupt."""
  if signal.getsignal(signal.SIGINT) is _end:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def is_command(package: str) -> bool:
  """Whether Python is about to run a module of a package: `python -m PACKAGE.NAME`.

  Args:
    package: which is being imported for it.
  """
  if sys.argv[:1] != ['-m']:  # What stands there until the module is found.
    return False
  name = sys.orig_argv[-len(sys.argv)]  # What follows it are its own arguments.
  return re.match(rf'(-\w*m)?{package}\.', name) is not None


def _end(number: int, frame: FrameType | None) -> None:
  # An exception would be some import's, which may take it for its own.
  try:
    os.write(2, b'error: interrupted\n')
  finally:
    os._exit(128 + number)
