"""Files of more bands, or of more bits in several bands, than Pillow reads: TIFF by tifffile, 16-bit PNG by OpenCV."""

from __future__ import annotations

import io
import os

import cv2
import numpy as np
from PIL import Image

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such a file begins; +: of more than 4 GB
_PNG = b"\x89PNG"
_PNG_BITS, _PNG_KIND = 24, 25  # where a PNG says how many bits a sample has, and which channels there are
_PNG_COLOUR = (2, 6)  # RGB, RGBA


def read(data: bytes | os.PathLike, channels: int, *, deep: bool) -> np.ndarray | None:
  """The samples [H, W] or [H, W, C] (or [C, H, W]) of a file that Pillow would not give as they are; else None.

  Args:
    data: the encoded image or a path to it.
    channels: those that are wanted; 3: RGB.
    deep: samples of more than 8 bits are wanted whole.

  Raises:
    ImportError: if tifffile is needed and missing.
    Exception: almost any, for a damaged file.
  """
  start = _start(data)
  if start.startswith(_TIFF) and (channels != 3 or not _pillow_reads(data, deep)):
    return _tiff(data)
  if not deep or not start.startswith(_PNG) or len(start) <= _PNG_KIND:
    return None
  if start[_PNG_BITS] == 16 and start[_PNG_KIND] in _PNG_COLOUR:
    return _png(data)
  return None


def _start(data: bytes | os.PathLike) -> bytes:
  if isinstance(data, bytes):
    return data[:32]
  with open(data, "rb") as file:
    return file.read(32)


def _pillow_reads(data: bytes | os.PathLike, deep: bool) -> bool:
  """Whether Pillow reads a TIFF, and whole; in one grey band it does so with any number of bits."""
  try:
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
      bits = image.tag_v2.get(258, (8,))  # BitsPerSample
      return not deep or max(bits) <= 8 or len(bits) == 1
  except Image.UnidentifiedImageError:
    return False


def _tiff(data: bytes | os.PathLike) -> np.ndarray:
  try:
    import tifffile
  except ImportError as error:
    raise ImportError(
      "TIFF files of several bands, or of several bands of 16 bits, need the package tifffile: pip install "
      "'vit-jax[tiff]'"
    ) from error
  with tifffile.TiffFile(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
    return file.series[0].asarray()


def _png(data: bytes | os.PathLike) -> np.ndarray:
  if not isinstance(data, bytes):
    with open(data, "rb") as file:
      data = file.read()
  samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
  if samples is None:
    raise ValueError("a damaged PNG")
  return cv2.cvtColor(samples, cv2.COLOR_BGR2RGB if samples.shape[2] == 3 else cv2.COLOR_BGRA2RGBA)
