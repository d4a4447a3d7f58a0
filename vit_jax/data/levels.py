"""Values of images that do not have 8 bits -> 0 to 255, by a rule that is the same for all images.

  * booleans: 0 and 255; 8 bits: as they are.
  * `value_range` = (low, high), where one is given: these become 0 and 255, what lies outside is cut off.
  * without one, unsigned values of up to 16 bits: their type says what they reach, 0 to 65535 for 16 bits (their high
    byte remains), 0 to 4095 where the file says that they have 12 bits.
  * without one, floats: 0 to 1; an image with values outside is refused, as nothing says what they mean.
  * without one, all other integers are refused.
  * NaN is a missing value, as in the data of satellites: it becomes 0. An image that consists of them for more than a
    half, or has an infinite value, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from vit_jax.data.errors import BadImage, UnknownRange

KINDS = "biuf"  # NumPy's kinds of types that an image may have: booleans, integers, floats
_ROUNDING = 0.5 / 255  # how far floats may lie outside 0 to 1: half a level of 8 bits
_USUAL = ((-1.0, 1.0), (0.0, 255.0))  # other ranges that floats usually have
_FULL = (255, 4095)  # what integers of 8 and of 12 bits reach
_MISSING = 0.5  # share of an image's values that may be missing
_CHUNK = 1 << 22  # values that are scaled at a time: the intermediate ones are larger than the result


class Spread(NamedTuple):
  """What the values of an image, or of several of one type, are like."""

  kind: str  # name of their type
  low: float  # least
  high: float  # greatest, of those that are finite
  size: int = 0  # number of values
  missing: int = 0  # of these: NaN
  infinite: int = 0
  bits: int | None = None  # that the file says they have

  def __or__(self, other: Spread) -> Spread:
    """That of both."""
    return Spread(
      self.kind,
      min(self.low, other.low),
      max(self.high, other.high),
      self.size + other.size,
      self.missing + other.missing,
      self.infinite + other.infinite,
      self.bits,
    )

  @property
  def text(self) -> str:
    return f"{number(self.low)} to {number(self.high)}"


def to_uint8(
  array: np.ndarray, name: str, value_range: tuple[float, float] | None = None, *, bits: int | None = None
) -> UInt8[np.ndarray, " ..."]:
  """Values of any type -> uint8, by the rules at the top of this file.

  Args:
    array: of one of `KINDS`.
    name: of the image.
    value_range: (low, high); None: by the type.
    bits: of an unsigned integer, if the file says that it uses fewer than its type has.

  Raises:
    UnknownRange: if nothing says what the values mean.
    BadImage: if too many are missing, or one is infinite.
  """
  if array.dtype == np.uint8:
    return array
  if array.dtype == bool:
    return array.astype(np.uint8) * np.uint8(255)
  if array.dtype.kind == "f":
    seen = check_floats(array, name)
    if value_range is None and not _lies_in(seen, 0.0, 1.0):
      raise _unknown(name, seen, "and floats are taken for 0 (black) to 1 (white)")
  elif value_range is None:
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
      raise _unknown(name, spread(array), "which do not say what is black and what is white")
    shift = (bits or 16) - 8
    return np.minimum(array >> shift, 255).astype(np.uint8)
  low, high = map(float, value_range or (0.0, 1.0))
  levels = np.empty(array.shape, np.uint8)
  for part, into in _chunks(array, levels):
    if part.dtype == np.float16:
      part = part.astype(np.float32)  # which can hold any range
    scaled = (np.clip(part, low, high).astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))
    into[...] = (np.nan_to_num(scaled) + np.float32(0.5)).astype(np.uint8)
  return levels


def spread(array: np.ndarray, bits: int | None = None) -> Spread:
  """The range of an image's values, and how many of them are none."""
  if array.dtype.kind != "f":
    return Spread(array.dtype.name, int(array.min()), int(array.max()), array.size, bits=bits)
  low, high, missing, infinite = np.inf, -np.inf, 0, 0
  for part, _ in _chunks(array):
    finite = np.isfinite(part)
    if not finite.all():
      nan = int(np.isnan(part).sum())
      missing, infinite = missing + nan, infinite + int(finite.size - finite.sum()) - nan
      part = part[finite]
    if part.size:
      low, high = min(low, float(part.min())), max(high, float(part.max()))
  return Spread(array.dtype.name, low, high, array.size, missing, infinite)


def advice(seen: Spread) -> str | None:
  """The `data.value_range` to set for images whose values are all like this; None: none is needed."""
  low, high = seen.low, seen.high
  if seen.kind in ("bool", "uint8") or low > high:
    return None
  if seen.kind.startswith("float"):
    if _lies_in(seen, 0.0, 1.0):
      return None
    low, high = next((pair for pair in _USUAL if _lies_in(seen, *pair)), (low, high))
  else:
    if seen.kind == "uint16" and high > 1 << ((seen.bits or 16) - 2):
      return None
    if low >= 0:
      low, high = 0, next((full for full in _FULL if high <= full), high)
  return f"({number(low)},{number(high if high > low else low + 1)})"


def fate(seen: Spread) -> str:
  """What becomes of such values without a range, in words."""
  if seen.kind == "uint16":
    return f"without a range they become at most {int(seen.high) >> (seen.bits or 16) - 8} of 255"
  return "refused without a range"


def number(value: float) -> str:
  """A number as it is written in a config."""
  return str(int(value)) if float(value).is_integer() and abs(value) < 1 << 53 else f"{value:.6g}"


def check_floats(array: np.ndarray, name: str) -> Spread:
  """What floats are like.

  Raises:
    BadImage: if they are no image whatever the range: too many are missing, or one is infinite.
  """
  seen = spread(array)
  if seen.infinite:
    raise BadImage(name, f"{seen.infinite:,} of its {seen.size:,} values are infinite")
  if seen.missing > _MISSING * seen.size:
    raise BadImage(name, f"{seen.missing:,} of its {seen.size:,} values are missing (NaN): at most half of them may be")
  return seen


def _lies_in(seen: Spread, low: float, high: float) -> bool:
  return low - _ROUNDING <= seen.low and seen.high <= high + _ROUNDING


def _unknown(name: str, seen: Spread, why: str) -> UnknownRange:
  return UnknownRange(
    name,
    f"has {seen.kind} values from {seen.text}, {why}: set data.value_range=(low,high), the same for all images "
    "(`vit-jax data scan` prints it)",
  )


def _chunks(array: np.ndarray, into: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
  """Parts of an array along its first axis, each with the same part of another."""
  rows = max(1, _CHUNK * len(array) // max(1, array.size))
  for start in range(0, len(array), rows):
    part = slice(start, start + rows)
    yield array[part], None if into is None else into[part]
