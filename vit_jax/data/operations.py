"""The deterministic operations of the multi-crop augmentation on the host (reference [6.3]).

Each is a pure function and gives what the reference's transforms give on 8-bit images, within one level. Pillow
resizes, antialiased as OpenCV cannot; the rest is OpenCV's on arrays, which takes a third of Pillow's time.
"""

from __future__ import annotations

import functools

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

cv2.setNumThreads(0)  # the pipeline's workers share the cores already

_TAPS = 9
_NO_TAP = 1e-4  # a weight that cannot change an 8-bit value
_CUT = -0.499  # makes rounding to the nearest level a cutting off, but for the error of float32
_LUMA = np.array([[19595, 38470, 7471]]) / 65536.0  # ITU-R 601 as Pillow has it

Pixels = UInt8[np.ndarray, "H W 3"]


def crop_and_resize(image: Image.Image, top: int, left: int, height: int, width: int, size: int) -> Image.Image:
  """Cuts a box out and resizes it to size x size: bicubic, antialiased, and blind to what lies outside the box."""
  return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)


def resize(image: Image.Image, size: int) -> Image.Image:
  """Resizes to size x size as `crop_and_resize` does."""
  return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def adjust_brightness(pixels: Pixels, factor: float) -> Pixels:
  """factor x value."""
  return _blend(pixels, 0, factor)


def adjust_contrast(pixels: Pixels, factor: float) -> Pixels:
  """mean + factor x (value - mean), the mean being that of the image's luma, rounded."""
  return _blend(pixels, int(cv2.mean(_luma(pixels))[0] + 0.5), factor)


def _blend(pixels: Pixels, base: int, factor: float) -> Pixels:
  levels = np.arange(256, dtype=np.float32)
  table = np.clip(base + np.float32(factor) * (levels - base), 0.0, 255.0).astype(np.uint8)  # cut off, as Pillow does
  return cv2.LUT(pixels, table)


def adjust_saturation(pixels: Pixels, factor: float) -> Pixels:
  """luma + factor x (value - luma)."""
  return cv2.addWeighted(pixels, factor, grayscale(pixels), 1.0 - factor, _CUT)


def adjust_hue(pixels: Pixels, shift: float) -> Pixels:
  """Turns the colour circle by `shift` turns, in 8-bit hue, saturation and value as Pillow does.

  Where the hue lies on the border of two of its 256 steps, Pillow may take the other: one colour in a thousand.
  """
  hsv = cv2.cvtColor(pixels.astype(np.float32), cv2.COLOR_RGB2HSV)  # [H, W, 3]  degrees, 0 to 1, levels
  hsv = cv2.multiply(hsv, (255.0 / 360.0, 255.0, 1.0, 0.0))
  hsv += np.float32(1e-3)  # whole steps stay whole as what is left of them is cut off
  turned = cv2.LUT(hsv.astype(np.uint8), _hue_table(int(shift * 255) % 256))
  return cv2.convertScaleAbs(cv2.cvtColor(turned, cv2.COLOR_HSV2RGB))


@functools.cache
def _hue_table(steps: int) -> Float32[np.ndarray, "1 256 3"]:
  """8-bit hue, turned by so many of its steps, saturation and value as OpenCV has them in floating point."""
  levels = np.arange(256)
  columns = ((levels + steps) % 256 * (360.0 / 255.0), levels / 255.0, levels)
  return np.stack(columns, axis=-1).astype(np.float32)[None]


def grayscale(pixels: Pixels) -> Pixels:
  """Luma (ITU-R 601) in all three channels."""
  return cv2.cvtColor(_luma(pixels), cv2.COLOR_GRAY2RGB)


def _luma(pixels: Pixels) -> UInt8[np.ndarray, "H W"]:
  return cv2.transform(pixels, _LUMA)


def gaussian_blur(pixels: Pixels, sigma: float) -> Pixels:
  """Gaussian blur of 9 x 9 taps with mirrored borders, rounded."""
  taps = cv2.getGaussianKernel(_TAPS, sigma, cv2.CV_32F)
  unseen = int((taps[: _TAPS // 2] < _NO_TAP).sum())  # at each end
  taps = taps[unseen : _TAPS - unseen]
  return pixels if len(taps) == 1 else cv2.sepFilter2D(pixels, -1, taps, taps, borderType=cv2.BORDER_REFLECT_101)


def solarize(pixels: Pixels) -> Pixels:
  """Inverts the values from 128 on."""
  return pixels ^ ((pixels >> 7) * np.uint8(255))


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)  # in the order of the draws
