"""The deterministic operations of the multi-crop augmentation, on Pillow images (reference [6.3]).

Each is a pure function and gives what the reference's transforms give on 8-bit images: the colour operations to the
level, the blur and everything after it within one level. Where Pillow has the operation it is used; hue, which costs
most, goes back to RGB by table instead (a third of the time).
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from scipy import ndimage

_BLUR_RADIUS = 4  # 9 taps
_NO_TAP = 1e-4  # a weight that cannot change an 8-bit value
_BLOCK = 8192  # pixels at a time: what a core's cache holds


def crop_and_resize(image: Image.Image, top: int, left: int, height: int, width: int, size: int) -> Image.Image:
  """Cuts a box out and resizes it to size x size: bicubic, antialiased, and blind to what lies outside the box."""
  return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)


def resize(image: Image.Image, size: int) -> Image.Image:
  """Resizes to size x size as `crop_and_resize` does."""
  return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
  """factor x value."""
  return Image.blend(_black(image.size), image, factor)


@functools.cache
def _black(size: tuple[int, int]) -> Image.Image:
  return Image.new("RGB", size)


def _samples(image: Image.Image) -> UInt8[np.ndarray, " n"]:
  """The image's bytes as they lie in memory; np.asarray of an image takes twice as long for small ones."""
  return np.frombuffer(image.tobytes(), np.uint8)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
  """mean + factor x (value - mean), the mean being that of the image's luma, rounded."""
  luma = _samples(image.convert("L"))
  mean = int(luma.sum(dtype=np.uint64) / luma.size + 0.5)
  return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
  """luma + factor x (value - luma)."""
  return Image.blend(grayscale(image), image, factor)


def adjust_hue(image: Image.Image, shift: float) -> Image.Image:
  """Turns the colour circle by `shift` turns, in 8-bit hue, saturation and value."""
  steps = np.uint8(int(shift * 255) % 256)
  hsv = _samples(image.convert("HSV")).reshape(-1, 3)  # [P, 3]
  rgb = np.empty(hsv.shape, np.uint8)
  for start in range(0, len(hsv), _BLOCK):
    block = hsv[start : start + _BLOCK]
    hue = (block[:, 0] + steps).astype(np.intp)  # [b]
    value = block[:, 2].astype(np.float32)
    chroma = block[:, 1] * value
    value += np.float32(0.5)
    for channel, lack in enumerate(_hue_table()):
      part = lack.take(hue, mode="clip")
      part *= chroma
      rgb[start : start + _BLOCK, channel] = np.subtract(value, part, out=part)
  return Image.frombytes("RGB", image.size, rgb)


@functools.cache
def _hue_table() -> Float32[np.ndarray, "3 256"]:
  """For each 8-bit hue, how much of value x saturation / 255 each of R, G, B lacks to the value."""
  position = np.arange(256) * 6.0 / 255.0
  sector, part = np.floor(position).astype(int) % 6, position - np.floor(position)
  falling, rising = part, 1.0 - part
  zero, one = np.zeros(256), np.ones(256)
  red = np.choose(sector, [zero, falling, one, one, rising, zero])
  green = np.choose(sector, [rising, zero, zero, falling, one, one])
  blue = np.choose(sector, [one, one, rising, zero, zero, falling])
  return (np.stack([red, green, blue]) / 255.0).astype(np.float32)


def grayscale(image: Image.Image) -> Image.Image:
  """Luma (ITU-R 601) in all three channels."""
  return image.convert("L").convert("RGB")


def gaussian_blur(pixels: UInt8[np.ndarray, "H W 3"], sigma: float) -> UInt8[np.ndarray, "H W 3"]:
  """Gaussian blur of 9 x 9 taps with mirrored borders, rounded."""
  taps = np.exp(-0.5 * (np.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1) / sigma) ** 2)  # [9]
  taps /= taps.sum()
  unseen = int((taps[:_BLUR_RADIUS] < _NO_TAP).sum())  # at each end
  taps = taps[unseen : len(taps) - unseen]
  if len(taps) == 1:
    return pixels
  blurred = ndimage.correlate1d(pixels, taps, axis=0, output=np.float32, mode="mirror")
  blurred = ndimage.correlate1d(blurred, taps, axis=1, mode="mirror")
  return np.rint(blurred, out=blurred).astype(np.uint8)


def solarize(pixels: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
  """Inverts the values from 128 on."""
  return pixels ^ ((pixels >> 7) * np.uint8(255))


ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)  # in the order of the draws
