"""When a run saves: every N steps, every M minutes, at the end (and when it is asked to stop: see interrupts.py)."""

from __future__ import annotations

import time
from collections.abc import Callable

import jax

from vit_jax.parallel import Agreement


class SaveTimes:
  """Says after which steps to save; the same on all processes.

  Args:
    every: steps between saves.
    minutes: saves are at most so far apart, by the clock of process 0; None: by steps alone.
    total: the last step of the run.
    clock: seconds, monotonic; for tests.
  """

  def __init__(self, every: int, minutes: float | None, total: int, *, clock: Callable[[], float] = time.monotonic):
    self._every, self._total = every, total
    self._seconds = None if minutes is None else 60 * minutes
    self._clock = clock
    self._agreement = Agreement("save")
    self._last = clock()

  def due(self, step: int) -> bool:
    """Whether to save after this step; each process must ask after every step."""
    if self._seconds is not None and jax.process_index() == 0 and self._clock() - self._last >= self._seconds:
      self._last = self._clock()
      self._agreement.ask()
    agreed = self._seconds is not None and self._agreement.due(step)
    return agreed or step % self._every == 0 or step == self._total

  def saved(self) -> None:
    """The minutes count from now."""
    self._last = self._clock()
