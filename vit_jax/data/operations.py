"""The deterministic operations of the multi-crop augmentation on the host (reference [6.3]).

Each is a pure function and gives what the reference's transforms give on 8-bit images, within one level. They are made
of OpenCV's on arrays, which take a third of Pillow's time. Cutting out and resizing is `resampling.py`'s.
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
_DIFFERENCES = np.array([[511, -510, -1, 511 * 255 + 255]], np.float32)  # 511 (red - green + 255) + green - blue + 255
_LUMA = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536.0  # ITU-R 601 as Pillow has it, and a half

Pixels = UInt8[np.ndarray, "H W C"]  # hue, saturation and grayscale: RGB


def adjust_brightness(pixels: Pixels, factor: float) -> Pixels:
  """factor x value."""
  return _blend(pixels, 0, factor)


def adjust_contrast(pixels: Pixels, factor: float) -> Pixels:
  """mean + factor x (value - mean), the mean being that of the image's luma (of its channels if not RGB), rounded."""
  return _blend(pixels, int(cv2.mean(_luma(pixels))[0] + 0.5), factor)


def _blend(pixels: Pixels, base: int, factor: float) -> Pixels:
  levels = np.arange(256, dtype=np.float32)
  table = np.clip(base + np.float32(factor) * (levels - base), 0.0, 255.0).astype(np.uint8)  # cut off, as Pillow does
  return cv2.LUT(pixels, table).reshape(pixels.shape)  # OpenCV drops a single channel


def adjust_saturation(pixels: Pixels, factor: float) -> Pixels:
  """luma + factor x (value - luma)."""
  return cv2.addWeighted(pixels, factor, grayscale(pixels), 1.0 - factor, _CUT)


def adjust_hue(pixels: Pixels, shift: float) -> Pixels:
  """Turns the colour circle by `shift` turns, in 8-bit hue, saturation and value as Pillow does."""
  turned = cv2.LUT(_hsv(pixels), _hue_table(int(shift * 255) % 256))
  return cv2.convertScaleAbs(cv2.cvtColor(turned, cv2.COLOR_HSV2RGB))


def _hsv(pixels: Pixels) -> Pixels:
  """Hue, saturation and value exactly as Pillow has them: of its 256 hues the next one is up to 6 levels away."""
  hues, saturations = _hsv_tables()
  differences = cv2.transform(pixels.astype(np.float32), _DIFFERENCES).astype(np.intp)  # [H, W]  exact below 2^24
  red, green, blue = cv2.split(pixels)
  value, lowest = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
  extremes = cv2.merge([lowest, value]).view("<u2")[:, :, 0]  # [H, W]  256 value + lowest
  return cv2.merge([hues.take(differences), saturations.take(extremes), value])


@functools.cache
def _hsv_tables() -> tuple[UInt8[np.ndarray, " 261121"], UInt8[np.ndarray, " 65536"]]:
  """(hue by the differences of the channels, saturation by value and lowest channel), as Pillow computes them."""
  red, blue = np.mgrid[-255:256, -255:256]  # less green; the second one is green - blue
  colours = np.stack([red, np.zeros_like(red), -blue], axis=-1)
  colours -= colours.min(axis=-1, keepdims=True)
  value, lowest = np.mgrid[:256, :256]
  lowest = np.minimum(value, lowest)
  # Differences that no colour has are cut off, and never looked up.
  hue = _pillow_hsv(np.minimum(colours, 255))[:, :, 0]
  saturation = _pillow_hsv(np.stack([value, lowest, lowest], axis=-1))[:, :, 1]
  return np.ascontiguousarray(hue).ravel(), np.ascontiguousarray(saturation).ravel()


def _pillow_hsv(colours: np.ndarray) -> Pixels:
  return np.asarray(Image.fromarray(colours.astype(np.uint8)).convert("HSV"))


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
  if pixels.shape[2] == 3:
    return cv2.transform(pixels.astype(np.float32), _LUMA).astype(np.uint8)  # exact: sums below 2^24 parts, cut off
  return np.floor(pixels.mean(axis=2, dtype=np.float32) + np.float32(0.5)).astype(np.uint8)


def gaussian_blur(pixels: Pixels, sigma: float) -> Pixels:
  """Gaussian blur of 9 x 9 taps with mirrored borders, rounded."""
  taps = cv2.getGaussianKernel(_TAPS, sigma, cv2.CV_32F)
  unseen = int((taps[: _TAPS // 2] < _NO_TAP).sum())  # at each end
  taps = taps[unseen : _TAPS - unseen]
  if len(taps) == 1:
    return pixels
  return cv2.sepFilter2D(pixels, -1, taps, taps, borderType=cv2.BORDER_REFLECT_101).reshape(pixels.shape)


def flip(pixels: Pixels, mirrored: bool) -> Pixels:
  """The image in a mirror, if it is to be."""
  return cv2.flip(pixels, 1).reshape(pixels.shape) if mirrored else pixels


def solarize(pixels: Pixels) -> Pixels:
  """Inverts the values from 128 on."""
  return pixels ^ ((pixels >> 7) * np.uint8(255))


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)  # in the order of the draws
