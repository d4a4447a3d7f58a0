"""Reads records from a source that may stall or fail for a moment, as what lies behind a network does.

A record of an object store that does not come within the time-out is reported and asked for again, in another thread: a
read that hangs cannot be interrupted. A source that stays silent ends the run, with the record's name: to put another
image in its place would make the stream depend on the network's mood. The run, started again, goes on exactly. Files of
the operating system are read directly, where asking again would hang again; the pipeline reports when no batch comes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any

import numpy as np

from vit_jax.data.sources import Source

log = logging.getLogger(__name__)

_TRIES = 5
_PAUSE = 0.5  # seconds before a failed read over a network is tried again; doubled each time
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # waiting does not help


class Stalled(RuntimeError):
  """A source that does not answer."""


class Reader:
  """`reader[i]` is `source[i]`, asked for several times if need be. Picklable; any number of threads may share it."""

  def __init__(self, source: Source, timeout: float | None):
    """`timeout`: seconds; None: wait for ever."""
    self._source, self._timeout = source, timeout
    self._remote = bool(getattr(source, "remote", False))
    self._direct = timeout is None or not self._remote
    self._threads = threading.local()

  def __reduce__(self):
    return (Reader, (self._source, self._timeout))

  def __getitem__(self, record: int) -> dict[str, bytes | np.ndarray | int]:
    """The record.

    Raises:
      Stalled: if it does not come over a network within the time-out, in `_TRIES` attempts.
      Exception: what the source raises; over a network only after as many attempts, if waiting might help.
    """
    for attempt in range(1, _TRIES + 1):
      try:
        return self._source[record] if self._direct else self._in_time(record)
      except Stalled:
        again = "asking again" if attempt < _TRIES else "giving up"
        log.warning(
          "data: %s has not come within data.timeout = %g s (attempt %d of %d): %s",
          self._name(record), self._timeout, attempt, _TRIES, again,
        )  # fmt: skip
        if attempt == _TRIES:
          raise
      except OSError as error:
        if not self._remote or isinstance(error, _LASTING) or attempt == _TRIES:
          raise
        log.warning("data: %s failed (%s), trying again", self._source.describe(record), error)
        time.sleep(_PAUSE * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")

  def _in_time(self, record: int) -> dict[str, bytes | np.ndarray | int]:
    helper = getattr(self._threads, "helper", None)
    if helper is None:
      helper = self._threads.helper = _Helper(self._source)
    answer = helper.read(record, self._timeout)
    if answer is None:
      del self._threads.helper, helper  # it may never come back; a traceback would keep it
      raise Stalled(
        f"data.source does not answer: {self._name(record)} was asked for {_TRIES} times and did not come "
        f"within data.timeout = {self._timeout:g} s; start the run again when the source is reachable."
      )
    entry, error = answer
    if error is None:
      return entry
    try:
      raise error
    finally:
      del answer, error, helper  # the traceback holds this frame

  def _name(self, record: int) -> str:
    """What the source calls a record, unless to know it the source has to be asked, too."""
    name = [f"record {record}"]
    asking = threading.Thread(target=lambda: name.append(self._source.describe(record)), daemon=True)
    asking.start()
    asking.join(timeout=1.0)
    return name[-1]


class _Helper:
  """A thread that reads for one other thread, which waits no longer than it wants to; it ends with this object."""

  def __init__(self, source: Source):
    self._questions: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
    arguments = (source, self._questions, self._answers)
    threading.Thread(target=_answer, args=arguments, daemon=True, name="read-record").start()

  def read(self, record: int, timeout: float) -> tuple[Any, Exception | None] | None:
    """(the record, None) or (None, what went wrong); None: neither in time."""
    self._questions.put(record)
    try:
      return self._answers.get(timeout=timeout)
    except queue.Empty:
      return None

  def __del__(self):
    self._questions.put(None)


def _answer(source: Source, questions: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
  while (record := questions.get()) is not None:
    try:
      answers.put((source[record], None))
    except Exception as error:
      answers.put((None, error))
