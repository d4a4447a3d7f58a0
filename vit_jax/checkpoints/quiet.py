"""Keeps what Orbax prints besides its results out of the user's sight; its warnings stay."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any


def quiet_orbax() -> None:
  """Drops Orbax's progress lines (logged through absl) and asyncio's repeats of a failed read that was raised."""
  for name, passes in (("absl", _not_chatter), ("asyncio", _not_a_repeat)):
    logger = logging.getLogger(name)
    if passes not in logger.filters:
      logger.addFilter(passes)


@contextlib.contextmanager
def quiet_failures() -> Iterator[None]:
  """Drops what tensorstore's threads print, by the hundred, after the first failed read has been raised."""
  previous = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      previous(unraisable)

  sys.unraisablehook = hook
  yield
  sys.unraisablehook = previous  # not after a failure: the threads print on for a while


def _not_chatter(record: logging.LogRecord) -> bool:
  if "orbax" not in record.pathname:
    return True
  if record.exc_info:  # a failure that is raised, too: `Checkpoints` says it once, for people
    return False
  # Waiting is what `Checkpoints.wait` is called for.
  return record.levelno >= logging.WARNING and not record.getMessage().startswith("Waiting for previous save")


def _not_a_repeat(record: logging.LogRecord) -> bool:
  message = record.getMessage()
  return "orbax/checkpoint" not in message and "tensorstore_spec" not in message
