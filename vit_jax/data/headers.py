"""What the headers of some formats say, read before their decoders allocate memory, or where these do not tell."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

JPEG_SCAN = 10  # bytes that a scan of a JPEG has at least
_PNM = re.compile(rb"P([56])" + rb"(?:\s+(?:#[^\r\n]*[\r\n]+\s*)*(\d{1,9}))" * 3 + rb"\s")
_PNM_START = 1024  # bytes in which the header of a PNM file ends
_DEFLATED = 1032  # bytes that one of deflate can stand for
_MOST_CHUNKS = 1_000_000
_PNG_BANDS = {0: 1, 2: 3, 4: 2, 6: 4}  # by the kind of colour, without palettes


def webp_size(data: bytes) -> tuple[int, int] | None:
  """(width, height) of a WebP file, whose decoder takes memory for its pixels as it is opened; None: not known."""
  kind = data[12:16]
  if kind == b"VP8X" and len(data) >= 30:
    return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
  if kind == b"VP8L" and len(data) >= 25:
    bits = int.from_bytes(data[21:25], "little")
    return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
  if kind == b"VP8 " and len(data) >= 30:
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF
  return None


def jpeg_scans(data: bytes) -> int:
  """The number of scans in a JPEG, each of which may go through the whole image; encoders make about ten."""
  return data.count(b"\xff\xda")


def png_bands(data: bytes) -> tuple[int, int]:
  """(bands, bits of a value) of a PNG file; 0 bands: a palette."""
  return _PNG_BANDS.get(data[25], 0), data[24]


def png_is_whole(data: bytes) -> bool:
  """Whether all chunks of a PNG file are in it: there are decoders that take memory for what one claims."""
  place = 8
  for _ in range(_MOST_CHUNKS):
    if place + 12 > len(data):
      return False
    (length,) = struct.unpack_from(">I", data, place)
    end = data[place + 4 : place + 8] == b"IEND"
    place += 12 + length
    if end:
      return place <= len(data)
  return False


def png_fits(data: bytes) -> bool:
  """Whether a PNG file can hold as many values as it claims, were they all the same."""
  width, height = struct.unpack_from(">II", data, 16)
  bits = data[24] * max(1, png_bands(data)[0])
  return width * height * bits // 8 <= _DEFLATED * len(data)


class Pnm(NamedTuple):
  """A binary PGM or PPM file."""

  bands: int
  width: int
  height: int
  greatest: int  # value
  start: int  # of the values


def pnm(data: bytes) -> Pnm | None:
  """The header of a binary PGM or PPM file; None: it is of another kind."""
  found = _PNM.match(data[:_PNM_START])
  return Pnm(3 if found[1] == b"6" else 1, *(int(found[i]) for i in (2, 3, 4)), found.end()) if found else None


class Jpeg2000(NamedTuple):
  """A JPEG 2000 file."""

  bands: int
  bits: int  # of a value of the first band
  tile: tuple[int, int]  # width, height


def jpeg2000(data: bytes) -> Jpeg2000:
  """The header of a JPEG 2000 file.

  Raises:
    struct.error: if it ends in it, or has none.
  """
  start = data.find(b"\xff\x4f\xff\x51")
  if start < 0:
    raise struct.error("no codestream")
  width, height = struct.unpack_from(">II", data, start + 8)
  tile = struct.unpack_from(">II", data, start + 24)
  bands, depth = struct.unpack_from(">HB", data, start + 40)
  return Jpeg2000(bands, 1 + (depth & 0x7F), (min(tile[0], width), min(tile[1], height)))
