"""A request to stop, from the system or the keyboard, that lets the step end first."""

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
  """Notes SIGTERM and the first SIGINT while it is entered; a second SIGINT interrupts as usual."""

  def __init__(self):
    self.received: str | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> 'StopSignals':
    # Python lets only the main thread set handlers.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    if self.received and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.received = signal.Signals(number).name
    # What is buffered must not be written to from a handler.
    os.write(2, f'{self.received}: stopping after this step, with a checkpoint.\n'.encode())
