"""Keeps what Orbax prints besides its results out of the user's sight; its warnings stay."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any


def quiet_orbax() -> None:
  """Drops Orbax's progress lines (logged through absl) and asyncio's repeats of a failure that was raised."""
  for name, passes in (("absl", _not_chatter), ("asyncio", _not_a_repeat)):
    logger = logging.getLogger(name)
    if passes not in logger.filters:
      logger.addFilter(passes)
  if not isinstance(sys.unraisablehook, _Unraisable):
    sys.unraisablehook = _Unraisable(sys.unraisablehook)


class _Unraisable:
  """Drops what tensorstore's threads print, by the hundred and for a while, after a failure that has been raised."""

  def __init__(self, previous: Callable[[Any], None]):
    self._previous = previous

  def __call__(self, unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      self._previous(unraisable)


def _not_chatter(record: logging.LogRecord) -> bool:
  if "orbax" not in record.pathname:
    return True
  if record.exc_info:  # a failure that is raised, too: `Checkpoints` says it once, for people
    return False
  # Waiting is what `Checkpoints.wait` is called for.
  return record.levelno >= logging.WARNING and not record.getMessage().startswith("Waiting for previous save")


def _not_a_repeat(record: logging.LogRecord) -> bool:
  message = f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}"
  return not any(word in message for word in ("orbax/checkpoint", "tensorstore", "OCDBT"))
