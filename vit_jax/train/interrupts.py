"""Stopping on request: Ctrl-C and SIGTERM let the step end and the state be saved, everywhere at the same step.

What takes long and leaves the state as it is (waiting for data, evaluations, pictures) is given up for it, and made
again when the run goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import TypeVar

from vit_jax.parallel import Agreement, processes

log = logging.getLogger(__name__)
T = TypeVar("T")

# What launchers start again: EX_TEMPFAIL of sysexits.h, "try again later".
RESUMABLE = os.EX_TEMPFAIL
UNHEARD = 3.0  # seconds in which the main thread hears of a signal, unless it is in a library's hands
UNWINDING = 10.0  # seconds for the end of a run that has nothing (more) to save
STALLED = 30.0  # seconds, and three of the longest steps: after so long without one, the processes of a job are stuck
_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_owned = False


def own_process() -> None:
  """Says that the process is there for its run alone, as that of a command is.

  What cannot be interrupted (a compilation, a read that hangs) then ends with the process when there is nothing to
  save, where a program or a notebook would wait for it.
  """
  global _owned
  _owned = True


class Stopped(SystemExit):
  """The run was asked to stop, and saved its state first.

  The exit code is RESUMABLE; that of Ctrl-C is the shell's, as somebody wanted the run to end.
  """

  def __init__(self, number: int | None, step: int | None):
    super().__init__(128 + number if number == signal.SIGINT else RESUMABLE)
    self.step = step


class GivenUp(BaseException):
  """What was being done is left, as the run is to stop: the state is that of the last step, to be saved now.

  No Exception: what handles the failures of data and of evaluations must let it pass.
  """


class Interrupts:
  """Catches SIGINT and SIGTERM; a second SIGINT acts as usual. Restores the handlers on exit.

      with Interrupts() as interrupts:
        ...                                  # nothing to save: a signal ends this at once
        for step in …:
          with interrupts.waiting():         # a signal ends the wait
            batch = next(batches)
          interrupts.protect()               # from now on it is heard …
          state = step_fn(state, batch)
          interrupts.check()                 # … here: GivenUp, on all processes after the same step
          interrupts.apart(lambda: evaluate(state, interrupts.check))   # or here

  A signal to any process of a job stops all of them. They agree on a moment: the number of times that each has asked
  whether to stop, which all must do in the same places. A process that is alone need not ask: a signal ends its waits.

  Args:
    step: the step that the run begins with, as far as it is known.
    grace: seconds after SIGTERM when the process ends whether or not its state is saved; None: when it is saved.
  """

  def __init__(self, step: int | None = None, *, grace: float | None = None) -> None:
    self.received: int | None = None  # by this process
    self.step, self.grace = step, grace
    self._protected = self._waiting = self._left = self._due = False
    self._stop = Agreement("stop")
    self._moment, self._longest = 0, 0.0
    self._last = time.monotonic()
    self._previous: dict[int, object] = {}
    self._timers: list[threading.Timer] = []
    self._wakeup: tuple[socket.socket, socket.socket, int] | None = None

  def protect(self) -> None:
    """From now on there is something to save."""
    if not self._protected:
      self._protected, self._last = True, time.monotonic()

  def due(self) -> bool:
    """Whether all processes stop now; each must ask in the same places, until the answer is yes."""
    if not self._due:
      now = time.monotonic()
      self._longest, self._last = max(self._longest, now - self._last), now
      self._moment += 1
      alone = processes.current() is None
      self._due = self._stop.due(self._moment) or (alone and self.received is not None)
    return self._due

  def check(self) -> None:
    """Raises GivenUp if all processes stop now; to be called as `due`, also by what runs `apart`."""
    if self.due():
      raise GivenUp

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """A wait of the main thread during which the state is whole: a signal to a process that is alone ends it.

    Of several processes the others would wait for this one: they go on to the moment that all agree on.

    Raises:
      GivenUp: at the signal.
      Stopped: if there is nothing to save, for a signal whose own exception was lost: Python drops what is raised while
        it tidies up.
    """
    if self.received is not None and not self._protected:
      raise Stopped(self.received, self.step)
    self._waiting = self._protected and processes.current() is None
    try:
      if self._waiting and self.received is not None:
        raise GivenUp
      yield
    finally:
      self._waiting = False

  def apart(self, work: Callable[[], T]) -> T:
    """What `work` returns: done by a thread, which is left behind if the process is asked to stop meanwhile.

    It must leave the state as it is, and call `check` now and then.

    Raises:
      GivenUp: if the run is to stop first.
    """
    thread = ThreadPoolExecutor(1, "apart")
    try:
      with self.waiting():
        return thread.submit(work).result()
    finally:
      thread.shutdown(wait=False)

  def saved(self) -> None:
    """There is nothing left to save: what now keeps the process from ending is not waited for."""
    self._protected = False
    if _owned:
      self._after(UNWINDING, self._end_if_stuck)

  def __enter__(self) -> Interrupts:
    if threading.current_thread() is not threading.main_thread():
      return self
    for number in _NUMBERS:
      self._previous[number] = signal.signal(number, self._handle)
    if _owned:
      reader, writer = socket.socketpair()
      writer.setblocking(False)
      self._wakeup = reader, writer, signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
      threading.Thread(target=self._listen, args=[reader], daemon=True, name="signals").start()
    return self

  def __exit__(self, *_: object) -> None:
    self._left = True
    for timer in self._timers:
      timer.cancel()
    if self._wakeup is not None:
      reader, writer, before = self._wakeup
      signal.set_wakeup_fd(before)
      writer.close()  # which ends the thread
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _: FrameType | None) -> None:
    first, self.received = self.received is None, self.received or number
    signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
    if not self._protected:
      if number == signal.SIGINT:
        raise KeyboardInterrupt
      if first:
        log.warning("%s", self._nothing_to_save(number))
        raise Stopped(number, self.step)
      return
    if not first:
      return
    if number == signal.SIGTERM and self.grace is not None:
      self._after(self.grace, self._out_of_time)
    self._stop.ask()
    name = signal.Signals(number).name
    if self._waiting:
      log.warning("%s: saving, then stopping (Ctrl-C again to stop at once).", name)
      raise GivenUp
    log.warning("%s: saving after this step, then stopping (Ctrl-C again to stop at once).", name)
    if processes.current() is not None:
      self._after(STALLED, self._end_if_stalled)

  def _nothing_to_save(self, number: int) -> str:
    goes_on = "" if self.step is None else f" from step {self.step}"
    name = signal.Signals(number).name
    return f"{name}: stopping; there is nothing new to save, the same command goes on{goes_on}."

  def _after(self, seconds: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    self._timers.append(timer)
    timer.start()

  def _listen(self, reader: socket.socket) -> None:
    """Hears of signals while the main thread is in a library's hands, where Python's own handler has to wait."""
    with reader:
      while numbers := reader.recv(64):
        for number in set(numbers).intersection(_NUMBERS):
          if not self._protected:
            self._after(UNHEARD, lambda number=number: self._end_if_unheard(number))
            self._after(UNWINDING, self._end_if_stuck)

  def _end_if_unheard(self, number: int) -> None:
    if self.received is None and not (self._left or self._protected):
      text = self._nothing_to_save(number)
      log.warning("%s", text)
      processes.end(text, Stopped(number, self.step).code)

  def _end_if_stuck(self) -> None:
    if self.received is not None and not (self._left or self._protected):
      text = f"stopped; what is still at work after {UNWINDING:g} s is left. The same command goes on."
      log.warning("%s", text)
      processes.end(text, Stopped(self.received, self.step).code)

  def _end_if_stalled(self) -> None:
    """Of several processes one may wait for data while the others wait for it: no step will end."""
    patience = STALLED + 3 * self._longest
    waited = time.monotonic() - self._last
    if self._left or self._due:
      return
    if waited < patience:
      self._after(patience - waited, self._end_if_stalled)
      return
    processes.end(
      f"no step has ended for {waited:.0f} s since the job was asked to stop (do the data stall?), and between two "
      "steps its state cannot be saved; ending. The same command goes on from the newest checkpoint.",
      RESUMABLE,
    )

  def _out_of_time(self) -> None:
    text = (
      f"checkpoint.grace={self.grace:g}: so many seconds after SIGTERM the state is not saved yet; ending. The same "
      "command goes on from the checkpoint before it."
    )
    log.error("%s", text)
    processes.end(text, RESUMABLE)
