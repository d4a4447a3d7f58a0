"""Stopping on request: Ctrl-C and SIGTERM let the step end and the state be saved, everywhere at the same step."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

from vit_jax.parallel import Agreement, processes

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

  A signal to any process of a job stops all of them. Until `protect` is called there is nothing to save, and the first
  signal ends the process at once.

  Args:
    step: the step that the run begins with.
    grace: seconds after SIGTERM when the process ends whether or not its state is saved; None: when it is saved.
  """

  def __init__(self, step: int = 0, *, grace: float | None = None) -> None:
    self.received: int | None = None  # by this process
    self._step, self._grace = step, grace
    self._protected = False
    self._stop = Agreement("stop")
    self._previous: dict[int, object] = {}
    self._alarm: threading.Timer | None = None

  def protect(self) -> None:
    """From now on there is something to save."""
    self._protected = True

  def due(self, step: int) -> bool:
    """Whether all processes stop after this step; each must ask after every step."""
    return self._stop.due(step)

  def __enter__(self) -> Interrupts:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    if self._alarm is not None:
      self._alarm.cancel()
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _: FrameType | None) -> None:
    name = signal.Signals(number).name
    signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
    if not self._protected and number == signal.SIGINT:
      raise KeyboardInterrupt
    if not self._protected:
      log.warning(
        "%s: stopping; there is nothing new to save, the same command goes on from step %d.", name, self._step
      )
      raise Stopped(number, self._step)
    if number == signal.SIGTERM and self._grace is not None and self._alarm is None:
      self._alarm = threading.Timer(self._grace, self._out_of_time)
      self._alarm.daemon = True
      self._alarm.start()
    self.received = number
    self._stop.ask()
    log.warning("%s: saving after this step, then stopping (Ctrl-C again to stop at once).", name)

  def _out_of_time(self) -> None:
    text = (
      f"checkpoint.grace={self._grace:g}: so many seconds after SIGTERM the state is not saved yet; ending. The same "
      "command goes on from the checkpoint before it."
    )
    log.error("%s", text)
    processes.end(text, RESUMABLE)
