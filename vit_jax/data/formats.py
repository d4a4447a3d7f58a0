"""The formats of images that are read: their names, the endings of their files, and what tells them by their content.

An ending only says which files of a folder or a shard are taken for images. What a file is, its first bytes decide, and
a decoder is given nothing but its own format: Pillow left to itself would try dozens, one of which runs Ghostscript.
"""

from __future__ import annotations

from typing import NamedTuple

START = 64  # bytes at the beginning of a file that tell its format


class Format(NamedTuple):
  """A format of images."""

  name: str
  endings: tuple[str, ...]
  decoder: str | None = None  # Pillow's name of it; None: Pillow does not read it


JPEG = Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG")
PNG = Format("PNG", (".png", ".apng"), "PNG")
WEBP = Format("WebP", (".webp",), "WEBP")
GIF = Format("GIF", (".gif",), "GIF")
BMP = Format("BMP", (".bmp",), "BMP")
TIFF = Format("TIFF", (".tif", ".tiff"), "TIFF")
PNM = Format("PNM", (".ppm", ".pgm", ".pbm", ".pnm"), "PPM")
AVIF = Format("AVIF", (".avif",), "AVIF")
HEIC = Format("HEIC", (".heic", ".heif", ".hif"), "HEIF")
JPEG2000 = Format("JPEG 2000", (".jp2", ".j2k", ".j2c", ".jpf", ".jpx"), "JPEG2000")
NPY = Format("NumPy array", (".npy",))

FORMATS = (JPEG, PNG, WEBP, GIF, BMP, TIFF, PNM, AVIF, HEIC, JPEG2000, NPY)
EXTENSIONS = tuple(ending for format in FORMATS for ending in format.endings)

_BEGINNINGS = (
  (b"\xff\xd8\xff", JPEG),
  (b"\x89PNG\r\n\x1a\n", PNG),
  (b"GIF87a", GIF),
  (b"GIF89a", GIF),
  (b"BM", BMP),
  (b"II*\0", TIFF),
  (b"MM\0*", TIFF),
  (b"II+\0", TIFF),  # +: of more than 4 GB
  (b"MM\0+", TIFF),
  (b"\0\0\0\x0cjP  \r\n\x87\n", JPEG2000),
  (b"\xff\x4f\xff\x51", JPEG2000),
  (b"\x93NUMPY", NPY),
)
_BRANDS = (  # of files made of boxes, in the first of which they are listed; those of AVIF first, as "mif1" is both
  (AVIF, {b"avif", b"avis"}),
  (HEIC, {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}),
)

# What else is found under the names of images, by its beginning; for messages.
_STRANGERS = (
  (b"%!PS", "PostScript"),
  (b"\xc5\xd0\xd3\xc6", "PostScript"),
  (b"%PDF", "PDF"),
  (b"version https://git-lfs", "a pointer of Git LFS (`git lfs pull` brings the file)"),
  (b"8BPS", "a Photoshop document"),
  (b"\0\0\1\0", "an icon"),
  (b"icns", "an icon"),
  (b"PK\3\4", "a zip archive"),
  (b"\x1f\x8b", "a gzip archive"),
  (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
  (b"qoif", "QOI"),
  (b"DDS ", "a DDS texture"),
  (b"SIMPLE  =", "FITS"),
  (b"\x89HDF", "HDF5"),
  (b"\xff\x0a", "JPEG XL"),
  (b"\0\0\0\x0cJXL ", "JPEG XL"),
  (b"\x1aE\xdf\xa3", "a video"),
)


def format_of(start: bytes) -> Format | None:
  """The format of the file that begins so (its first `START` bytes); None: none of those that are read."""
  for beginning, format in _BEGINNINGS:
    if start.startswith(beginning):
      return format
  if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
    return WEBP
  if start[:1] == b"P" and start[1:2] in b"123456" and start[2:3].isspace():
    return PNM
  brands = _brands(start)
  return next((format for format, known in _BRANDS if not known.isdisjoint(brands)), None)


def stranger(start: bytes) -> str:
  """What a file of no format that is read is, in words: "… is X"."""
  found = next((what for beginning, what in _STRANGERS if start.startswith(beginning)), None)
  text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
  if _brands(start) or (start[:4] == b"RIFF" and start[8:12] == b"AVI "):
    found = "a video"
  elif text.startswith((b"<!doctype html", b"<html")):
    found = "an HTML page, as a failed download leaves one"
  elif text.startswith((b"<svg", b"<?xml")):
    found = "XML, such as SVG"
  unknown = "no image of a known format"
  return f"{found}: {unknown}" if found else unknown


def _brands(start: bytes) -> set[bytes]:
  """The brands of a file made of boxes: its own and those that it is compatible with; none for other files."""
  if start[4:8] != b"ftyp":
    return set()
  end = min(int.from_bytes(start[:4], "big"), len(start))
  return {start[8:12]} | {start[i : i + 4] for i in range(16, end - 3, 4)}
