"""Boxes of an image, cut out and resized on the host: antialiased bicubic as Pillow's, in a fourth of its time.

An axis is resized by products with narrow matrices: neighbouring pixels of the result are made of neighbouring pixels
of the image, so that a few of them at a time need only a small block of the weights. The products are BLAS's, and yet
the same on every machine: weights are whole multiples of 2^-15, so that every sum is exact in float32.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

Planes = Float32[np.ndarray, "C H W"]  # levels from 0 to 255

_TOGETHER = 16  # pixels of the result made by one product: more of them would multiply more zeros
_UNIT = 2.0**15  # 255 times the weights of a pixel, without their signs, stay below 2^24 of its parts
_PRODUCT = 1 << 18  # multiply-adds in one call, up to which OpenBLAS starts no threads: the cores are shared already
_AT_A_TIME = 1 << 20  # values that the caches hold
_MATRICES = 512  # kept ready; 10 to 30 kB each for photographs of 500 pixels


def _cubic(x: np.ndarray) -> np.ndarray:
  near, far = (1.5 * x - 2.5) * x * x + 1.0, ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0
  return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


def _linear(x: np.ndarray) -> np.ndarray:
  return np.maximum(1.0 - x, 0.0)


KERNELS = {"bicubic": (2.0, _cubic), "bilinear": (1.0, _linear)}  # how far they reach, and their values


class _Band(NamedTuple):
  """How some neighbouring pixels of an axis are made."""

  made: slice  # these pixels of the result,
  seen: slice  # of these of the image,
  weights: Float32[np.ndarray, "seen made"]


def planes(pixels: UInt8[np.ndarray, "H W C"]) -> Planes:
  """An image as `crop_and_resize` wants it: made once for all of its crops."""
  height, width, channels = pixels.shape
  made = np.empty((channels, height, width), np.float32)
  for plane, channel in zip(made, cv2.split(pixels), strict=True):
    plane[...] = channel
  return made


def crop_and_resize(
  image: Planes, top: int, left: int, height: int, width: int, size: int
) -> UInt8[np.ndarray, "size size C"]:
  """Cuts a box out and resizes it to size x size: bicubic, antialiased, and blind to what lies outside the box."""
  box = image[:, top : top + height, left : left + width]
  half = np.empty((len(box), height, size), np.float32)
  for made, seen, weights in _bands(width, size):
    rows = max(1, _PRODUCT // weights.size)
    for first in range(0, height, rows):
      some = slice(first, first + rows)
      np.matmul(box[:, some, seen], weights, out=half[:, some, made])
  np.clip(np.rint(half, out=half), 0.0, 255.0, out=half)  # between the axes, as Pillow does
  whole = np.empty((len(box), size, size), np.float32)
  for made, seen, weights in _bands(height, size):
    columns = max(1, _PRODUCT // weights.size)
    for first in range(0, size, columns):
      some = slice(first, first + columns)
      np.matmul(weights.T, half[:, seen, some], out=whole[:, made, some])
  return cv2.merge([cv2.add(plane, 0.0, dtype=cv2.CV_8U) for plane in whole]).reshape(size, size, -1)


def resize(pixels: UInt8[np.ndarray, "H W C"], size: int) -> UInt8[np.ndarray, "size size C"]:
  """Resizes to size x size as `crop_and_resize` does."""
  height, width = pixels.shape[:2]
  if (height, width) == (size, size):
    return pixels
  return crop_and_resize(planes(pixels), 0, 0, height, width, size)


def resize_window(
  pixels: UInt8[np.ndarray, "H W C"], size: tuple[int, int], window: tuple[int, int, int, int], kernel: str = "bicubic"
) -> UInt8[np.ndarray, "h w C"]:
  """A window (top, left, height, width) of an image resized to `size` = (height, width), antialiased.

  Rows first, and nothing is rounded in between, so that the result is within one level of PyTorch's resizing of uint8
  and of Pillow's (which differ from one another by two in a few pixels of a million; and by more at edges of black and
  white where Pillow begins with the columns, as since version 13 it does with a few shapes). Only what the window shows
  is computed.

  Args:
    pixels: the image.
    size: of the whole of it, resized.
    window: inside of that.
    kernel: "bicubic" or "bilinear".
  """
  top, left, height, width = window
  rows = _bands(pixels.shape[0], size[0], top, top + height, kernel)
  above, below = min(band.seen.start for band in rows), max(band.seen.stop for band in rows)
  columns = _bands(pixels.shape[1], size[1], left, left + width, kernel)
  half = np.empty((pixels.shape[2], below - above, width), np.float32)
  together = max(1, _AT_A_TIME // pixels[0].size)
  for first in range(above, below, together):
    image = planes(pixels[first : min(first + together, below)])
    for made, seen, weights in columns:
      np.matmul(image[:, :, seen], weights, out=half[:, first - above : first - above + image.shape[1], made])
  exact = np.clip(half, 0.0, 255.0, out=half).astype(np.float64)  # whose products with weights are exact, too
  whole = np.empty((len(half), height, width))
  for made, seen, weights in rows:
    some = slice(seen.start - above, seen.stop - above)
    np.matmul(weights.T.astype(np.float64), exact[:, some], out=whole[:, made])
  return np.moveaxis(np.clip(np.rint(whole, out=whole), 0.0, 255.0, out=whole).astype(np.uint8), 0, 2).copy()


@functools.lru_cache(maxsize=_MATRICES)
def _bands(
  extent: int, size: int, first_made: int = 0, last_made: int | None = None, kernel: str = "bicubic"
) -> tuple[_Band, ...]:
  """The weights that make `size` pixels of `extent`, in blocks; of these the ones from first to before last.

  The kernel (cubic: a = -0.5) widens where the axis shrinks; the weights of a pixel add up to 1.
  """
  scale, number = extent / size, (size if last_made is None else last_made) - first_made
  stretch, (support, shape) = max(scale, 1.0), KERNELS[kernel]
  together = min(_TOGETHER, number)
  starts = np.arange(0, number, together)
  positions = first_made + np.arange(len(starts) * together).reshape(-1, 1, together)
  centres = (positions + 0.5) * scale - 0.5  # [bands, 1, made]
  seen = min(extent, math.ceil((together - 1) * scale + 2.0 * support * stretch) + 1)
  firsts = np.clip(np.ceil(centres[:, 0, 0] - support * stretch).astype(int), 0, extent - seen)  # [bands]
  weights = shape(np.abs(firsts[:, None, None] + np.arange(seen)[:, None] - centres) / stretch)  # [bands, seen, made]
  bands = []
  for start, first, block in zip(starts.tolist(), firsts.tolist(), weights, strict=True):
    block = block[:, : number - start]  # the last one may be narrower
    block = (np.rint(block * (_UNIT / block.sum(0))) / _UNIT).astype(np.float32)
    bands.append(_Band(slice(start, start + block.shape[1]), slice(first, first + seen), block))
  return tuple(bands)
