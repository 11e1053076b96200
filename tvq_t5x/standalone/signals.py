"""A request to stop, from the system or the keyboard, that lets the step end first."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
  """Notes SIGTERM and the first SIGINT while it is entered; a second SIGINT interrupts as usual.

  A signal that is ignored stays ignored, as the parent of a job in the background wants it.
  """

  def __init__(self):
    self.received: signal.Signals | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> 'StopSignals':
    # Python lets only the main thread set handlers.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
          self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._before.items():
      # Python can't set a handler again that was installed from C.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    if self.received and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = signal.Signals(number)
    # What is buffered must not be written to from a handler. And nobody may be there to read.
    with contextlib.suppress(OSError):
      text = f'{self.received.name}: stopping after this step, with a checkpoint.\n'
      os.write(2, text.encode())
