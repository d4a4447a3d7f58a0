"""TIFF files: what their headers claim, checked before a decoder believes it; those of many bands, by tifffile."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from vit_jax.data.arrays import channels_are_first
from vit_jax.data.errors import BadImage, NeedsPackage, OtherChannels, in_words
from vit_jax.data.limits import Limits

_TAGS = (
  _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _STRIPS, _ORIENTATION, _SAMPLES, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT,
  _TILES, _EXTRA, _KIND,
) = 256, 257, 258, 259, 262, 273, 274, 277, 284, 322, 323, 324, 338, 339  # fmt: skip
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR = 0, 1, 2, 6  # what the values of the bands mean
_OTHER_COLOURS = {3: "a palette", 4: "a mask", 5: "CMYK", _YCBCR: "YCbCr", 8: "Lab", 9: "Lab", 10: "Lab",
                  32803: "the mosaic of a camera's sensor", 34892: "a camera's own colours"}  # fmt: skip
_JPEG = 7
_NO_ALPHA, _PREMULTIPLIED = 0, 1  # what a band beside the colours is
_LETTERS = {1: "B", 3: "H", 4: "I", 6: "B", 8: "H", 9: "I", 13: "I", 16: "Q", 17: "Q", 18: "Q"}  # of types of integers
_MOST_PAGES = 1000  # of a stack of bands
_MOST_PARTS = 1_000_000  # strips or tiles of an image
_MOST_VALUES = 1024  # of a field that are looked at


class Header(NamedTuple):
  """What the first image of a file claims to be."""

  width: int
  height: int
  samples: int  # bands
  bits: int  # of a value, the most of all bands
  kind: str  # "u" | "i" | "f" | "": unsigned, signed, floating-point, another
  orientation: int  # as of EXIF
  separate: bool  # one band after the other
  colours: int  # what the values of its bands mean
  extra: int | None  # what the last band is, if it is none of the colours; None: not said
  jpeg: bool

  @property
  def plain(self) -> bool:
    """Whether its bands are grey or red, green and blue, or become so as they are decoded."""
    return self.colours in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB) or (self.colours == _YCBCR and self.jpeg)

  @property
  def white_is_zero(self) -> bool:
    """Whether the least value is white."""
    return self.colours == _WHITE_IS_ZERO and self.samples == 1

  @property
  def fewer_bits(self) -> int | None:
    """How many bits the values have, if not as many as their type."""
    return self.bits if self.kind == "u" and 8 < self.bits < 16 else None

  @property
  def dtype(self) -> np.dtype | None:
    """The type that holds the values; None: none of NumPy's."""
    whole = self.bits if self.kind != "u" else next((b for b in (8, 16, 32, 64) if self.bits <= b), 0)
    try:
      return np.dtype(f"{self.kind}{whole // 8}")
    except TypeError:
      return None


def read_header(data: bytes, name: str, limits: Limits) -> Header:
  """What the first image of a TIFF file claims to be.

  Raises:
    BadImage: if that, or the file's structure, is beyond what is read, or damaged.
  """
  try:
    return _checked_header(_File(data), name, limits, len(data))
  except struct.error as error:
    raise BadImage(name, f"is a TIFF file that is cut off or damaged ({in_words(error)})") from error


def _checked_header(file: _File, name: str, limits: Limits, nbytes: int) -> Header:
  (first,) = file.unpack("Q" if file.big else "I", 8 if file.big else 4)
  if sum(1 for _ in zip(file.directories(first), range(_MOST_PAGES + 1), strict=False)) > _MOST_PAGES:
    raise BadImage(name, f"has more than {_MOST_PAGES:,} pages, or pages in a circle")
  fields = file.fields(first)
  for tag, what in ((_STRIPS, "strips"), (_TILES, "tiles")):
    if tag in fields and fields[tag].count > _MOST_PARTS:
      raise BadImage(name, f"has {fields[tag].count:,} {what}: more than {_MOST_PARTS:,} are refused")

  def value(tag: int, default: int) -> int:
    return max(file.values(fields[tag]), default=default) if tag in fields else default

  kind = {1: "u", 2: "i", 3: "f"}.get(value(_KIND, 1), "")
  size, bands, bits = (value(_WIDTH, 0), value(_HEIGHT, 0)), value(_SAMPLES, 1), value(_BITS, 1)
  extra = file.values(fields[_EXTRA]) if _EXTRA in fields else ()
  header = Header(
    *size, bands, bits, kind, value(_ORIENTATION, 1), value(_PLANAR, 1) == 2,
    value(_COLOURS, _BLACK_IS_ZERO), extra[-1] if extra else None, value(_COMPRESSION, 1) == _JPEG,
  )  # fmt: skip
  limits.check_size(*size, name, pixel_bytes=bands * bits // 8, nbytes=nbytes)
  if value(_TILE_WIDTH, 1) * value(_TILE_HEIGHT, 1) > limits.max_pixels:
    raise BadImage(name, f"has tiles of more than data.max_pixels={limits.max_pixels:,} pixels")
  return header


def read_bands(data: bytes, name: str, channels: int, limits: Limits) -> np.ndarray:
  """The values [H, W], [H, W, C] or [C, H, W] of a file's first series of images.

  Args:
    data: the file.
    name: of the image.
    channels: that it must have (see `arrays.channels_last`).
    limits: on its size.

  Raises:
    NeedsPackage: if tifffile is not installed.
    BadImage: if it has other channels, is larger than is allowed, or does not hold all of itself.
    Exception: almost any, for a damaged file.
  """
  try:
    import tifffile
  except ImportError as error:
    reason = "is a TIFF file of several bands, of many bits or of a rare kind, which needs the package tifffile: "
    raise NeedsPackage(name, reason + 'pip install "vit-jax[tiff]"') from error
  with tifffile.TiffFile(io.BytesIO(data), _multifile=False) as file:  # others, which it may name, are not its own
    series = file.series[0]
    bands_first = series.axes[0] == "S"  # they say so; of other axes the lengths decide
    shape = (*series.shape[1:], series.shape[0]) if bands_first else series.shape
    channels_are_first(shape, series.dtype, name, channels, limits)
    for page in series.pages:
      if page is not None:
        _check_whole(page, len(data), name)
    array = series.asarray(maxworkers=1)
  return np.moveaxis(array, 0, 2) if bands_first else array


def without_extra(values: np.ndarray, header: Header, name: str) -> np.ndarray:
  """Values [H, W, bands] or [bands, H, W] of a file that is to become RGB, without a band that is none of its.

  Raises:
    OtherChannels: if the file does not say what its bands are.
    BadImage: if they are other colours, or multiplied by their alpha.
  """
  if not header.plain or (header.colours == _WHITE_IS_ZERO and header.samples > 1):
    colours = _OTHER_COLOURS.get(header.colours, f"colours of the kind {header.colours}")
    raise BadImage(name, f"is a TIFF file of {header.bits} bits of {colours}: convert it to RGB or grey")
  if header.samples not in (2, 4):
    return values
  if header.extra == _PREMULTIPLIED:
    reason = f"is a TIFF file of {header.bits} bits whose colours are multiplied by their alpha: convert it to PNG"
    raise BadImage(name, reason)
  if header.extra != _NO_ALPHA:
    return values
  if header.colours != _RGB:
    reason = f"has {header.samples} bands, none of which is said to be alpha (for all set model.in_channels="
    raise OtherChannels(name, f"{reason}{header.samples})", header.samples)
  return values[..., :3] if values.shape[-1] == 4 else values[:3]


def _check_whole(page: Any, nbytes: int, name: str) -> None:
  """Checks that all strips or tiles of an image are in the file: tifffile takes zeros for those that are not."""
  parts, places, lengths = math.prod(page.chunked), page.dataoffsets, page.databytecounts
  if len(places) < parts or any(place + length > nbytes for place, length in zip(places, lengths, strict=False)):
    raise BadImage(name, f"cannot be decoded: not all of its {parts:,} strips or tiles are there")


class _Field(NamedTuple):
  letter: str  # of its type, for `struct`
  count: int
  place: int  # of its values


class _File:
  """The directories of a TIFF file: lists of fields, one for each image in it, each with the place of the next."""

  def __init__(self, data: bytes):
    self._data = data
    self._order = "<" if data[:2] == b"II" else ">"
    self.big = 43 in data[2:4]  # BigTIFF: with places of 64 bits

  def unpack(self, format: str, place: int) -> tuple[int, ...]:
    return struct.unpack_from(self._order + format, self._data, place)

  def directories(self, place: int) -> Iterator[int]:
    """The places of all directories; what is damaged after the first one is as if it were not there."""
    while place:
      yield place
      try:
        start, count, length = self._entries(place)
        (place,) = self.unpack("Q" if self.big else "I", start + count * length)
      except struct.error:
        return

  def fields(self, place: int) -> dict[int, _Field]:
    """The fields of a directory that are read here, by their tags."""
    found = {}
    start, count, length = self._entries(place)
    for at in range(start, start + count * length, length):
      tag, kind, number = self.unpack("HHQ" if self.big else "HHI", at)
      if tag not in _TAGS or kind not in _LETTERS:
        continue
      room, inside = (8, at + 12) if self.big else (4, at + 8)
      if number * struct.calcsize("=" + _LETTERS[kind]) > room:
        (inside,) = self.unpack("Q" if self.big else "I", inside)
      found[tag] = _Field(_LETTERS[kind], number, inside)
    return found

  def values(self, field: _Field) -> tuple[int, ...]:
    return self.unpack(f"{min(field.count, _MOST_VALUES)}{field.letter}", field.place)

  def _entries(self, place: int) -> tuple[int, int, int]:
    """(where the entries of a directory begin, their number, the bytes of each)."""
    (count,) = self.unpack("Q" if self.big else "H", place)
    if count > 1 << 16:
      raise struct.error(f"a directory of {count:,} entries")
    return place + (8 if self.big else 2), count, 20 if self.big else 12
