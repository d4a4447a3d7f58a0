"""Durations: "1000 steps", "100 epochs", "2e6 examples", "10 %" (of the run), or a bare number of steps."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

from vit_jax.config.errors import ConfigError

UNITS = ("steps", "epochs", "examples", "%")
_RIGHT = 'must be like "1000 steps", "100 epochs", "2e6 examples" or "10 %"'


class Duration(NamedTuple):
  """A parsed duration. The number is exact, so that 10 % of 600 steps is 60 whatever the floating point."""

  number: Fraction
  unit: str  # one of UNITS


def parse_duration(text: str | int, *, key: str = "duration") -> Duration:
  """Parses a duration; singular units ("1 epoch") and bare numbers (steps) are understood.

  Raises:
    ConfigError: naming `key`, if `text` is no duration or is negative.
  """
  match = re.fullmatch(r"\s*([-+]?[\d_.]+(?:e[-+]?\d+)?)\s*([a-z]+|%)?\s*", str(text), re.IGNORECASE)
  if not match:
    raise ConfigError(f"{key}={text!r}: {_RIGHT}")
  unit = (match[2] or "steps").lower()
  if unit + "s" in UNITS:
    unit += "s"
  try:
    number = Fraction(match[1])
  except ValueError:
    number = None
  if number is None or unit not in UNITS:
    raise ConfigError(f"{key}={text!r}: {_RIGHT}")
  if number < 0:
    raise ConfigError(f"{key}={text!r}: must not be negative")
  return Duration(number, unit)


def resolve_duration(
  text: str | int,
  *,
  batch_size: int,
  num_examples: int | None = None,
  total_steps: int | None = None,
  epoch_steps: int | None = None,
  key: str = "duration",
) -> int:
  """The number of steps of a duration, rounded up: what is more than nothing is at least one step.

  Args:
    text: the duration.
    batch_size: images per step.
    num_examples: images in the data; an epoch is one pass over them unless `epoch_steps` says otherwise.
    total_steps: steps of the run, for percentages.
    epoch_steps: steps that make an epoch.
    key: the config key that holds the duration, for errors.

  Raises:
    ConfigError: if `text` is no duration, or its unit needs a number that is not known.
  """
  sizes = {"batch_size": batch_size, "num_examples": num_examples, "total_steps": total_steps}
  return math.ceil(exact_steps(text, **sizes, epoch_steps=epoch_steps, key=key))


def exact_steps(
  text: str | int,
  *,
  batch_size: int,
  num_examples: int | None = None,
  total_steps: int | None = None,
  epoch_steps: int | None = None,
  key: str = "duration",
) -> Fraction:
  """`resolve_duration` before it is rounded: what follows another duration can be rounded together with it."""
  number, unit = parse_duration(text, key=key)
  if unit == "steps":
    return number
  if unit == "examples":
    return number / batch_size
  if unit == "epochs":
    if epoch_steps is not None:
      return number * epoch_steps
    if num_examples is None:
      raise ConfigError(f"{key}={text!r}: the number of images is not known here: give steps or set epoch_steps")
    return number * num_examples / batch_size
  if total_steps is None:
    raise ConfigError(f"{key}={text!r}: a percentage needs the length of the run: give steps, epochs or examples")
  return number * total_steps / 100
