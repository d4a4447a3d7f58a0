"""What can be wrong with weights; the messages are for users."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

_LONGEST = 120  # characters of a text of others that a message repeats


class WeightsError(ValueError):
  """A weight file that cannot be read, or a model that a format cannot hold."""


class WeightMismatch(WeightsError):
  """Weights do not fit a model; the message lists every tensor that does not."""


class Unreadable(ValueError):
  """What is wrong with a file, found where its name is not known; `reading` makes a WeightsError of it."""


@contextlib.contextmanager
def reading(what: Any) -> Iterator[None]:
  """Whatever goes wrong while a file of others is read becomes a WeightsError that names it: no list of exceptions is
  complete, as those of memory, recursion, compression and text come from below."""
  try:
    yield
  except (WeightsError, FileNotFoundError):
    raise
  except Unreadable as error:
    raise WeightsError(f"{what} cannot be read: {error}.") from error
  except Exception as error:
    said = shown(str(error), 300).rstrip(".") or "no more is known"
    raise WeightsError(f"{what} cannot be read: it is damaged ({type(error).__name__}: {said}).") from error


@contextlib.contextmanager
def about(what: Any) -> Iterator[None]:
  """Says first in a WeightsError what it is about, unless it says so already."""
  try:
    yield
  except WeightsError as error:
    if str(what) in str(error):
      raise
    raise type(error)(f"{what}: {error}") from error


def shown(text: str, longest: int = _LONGEST) -> str:
  """A text out of a file as a message repeats it: short, and without what a terminal would obey."""
  cut = text[:longest]
  safe = cut if cut.isprintable() else cut.encode("unicode_escape").decode()
  return safe if len(text) <= longest else f"{safe}…"
