"""Stopping on request: Ctrl-C and SIGTERM let the step end and the state be saved, everywhere at the same step."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

from vit_jax.parallel import Agreement

log = logging.getLogger(__name__)

# What launchers start again: EX_TEMPFAIL of sysexits.h, "try again later".
RESUMABLE = os.EX_TEMPFAIL


class Stopped(SystemExit):
  """The run was asked to stop, and saved its state first.

  The exit code is RESUMABLE; that of Ctrl-C is the shell's, as somebody wanted the run to end.
  """

  def __init__(self, number: int | None, step: int):
    super().__init__(128 + number if number == signal.SIGINT else RESUMABLE)
    self.step = step


class Interrupts:
  """Catches the first SIGINT or SIGTERM; a second SIGINT acts as usual. Restores the handlers on exit.

  A signal to any process of a job stops all of them.
  """

  def __init__(self) -> None:
    self.received: int | None = None  # by this process
    self._stop = Agreement("stop")
    self._previous: dict[int, object] = {}

  def due(self, step: int) -> bool:
    """Whether all processes stop after this step; each must ask after every step."""
    return self._stop.due(step)

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
    self._stop.ask()
    signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
    name = signal.Signals(number).name
    log.warning("%s: saving after this step, then stopping (Ctrl-C again to stop at once).", name)
