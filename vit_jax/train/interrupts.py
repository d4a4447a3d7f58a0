"""Stopping on request: Ctrl-C and SIGTERM let the step end and the state be saved."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

log = logging.getLogger(__name__)


class Stopped(SystemExit):
  """The run was asked to stop, and saved its state first. The exit code is the shell's for the signal."""

  def __init__(self, number: int, step: int):
    super().__init__(128 + number)
    self.step = step


class Interrupts:
  """Catches the first SIGINT or SIGTERM; a second SIGINT acts as usual. Restores the handlers on exit."""

  def __init__(self) -> None:
    self.received: int | None = None
    self._previous: dict[int, object] = {}

  def __enter__(self) -> Interrupts:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _: FrameType | None) -> None:
    self.received = number
    signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
    name = signal.Signals(number).name
    log.warning("%s: saving after this step, then stopping (Ctrl-C again to stop at once).", name)
