"""Multi-crop augmentation on the host: draw the parameters of every crop of an image, then apply them (see [6.3]).

Drawing and applying are apart, so that a recorded draw can be replayed and the distributions be tested without images.
The order within a crop: random resized crop, horizontal flip, colour jitter, grayscale, blur, solarize.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vit_jax.data import operations
from vit_jax.data.views import Views

_TRIES = 10  # proposals for a crop box before the centre crop
_LOG_RATIO = (math.log(3.0 / 4.0), math.log(4.0 / 3.0))  # a box's aspect ratio is log-uniform in this range
_ORDERS = tuple(itertools.permutations(range(4)))  # of the four colour adjustments
_UNIFORMS = 2 * _TRIES + 2 + 11  # random numbers of one crop


class Crop(NamedTuple):
  """Everything that was drawn for one crop.

  `jitter` holds (which of `operations.ADJUSTMENTS`, its factor) in the order of application; `sigma` is None without a
  blur.
  """

  top: int
  left: int
  height: int
  width: int
  flip: bool = False
  jitter: tuple[tuple[int, float], ...] = ()
  grayscale: bool = False
  sigma: float | None = None
  solarize: bool = False


def draw_crops(rng: np.random.Generator, height: int, width: int, views: Views) -> list[Crop]:
  """Draws the crops of an image of this size: first global, second global, then the local ones.

  A fixed number of random numbers is drawn whatever the image and the outcome, all at once: a call of the generator
  for each would cost more than the rest.
  """
  uniforms = rng.random((2 + views.local_number, _UNIFORMS)).tolist()
  scales = [views.global_scale] * 2 + [views.local_scale] * views.local_number
  return [
    _draw_crop(row, height, width, scale, views, views.blur[min(i, 2)], views.solarize[min(i, 2)])
    for i, (row, scale) in enumerate(zip(uniforms, scales, strict=True))
  ]


def _draw_crop(
  uniforms: list[float], height: int, width: int, scale: tuple[float, float], views: Views, blur: float, solarize: float
) -> Crop:
  box = _draw_box(uniforms, height, width, scale)
  flip, jitter, order, brightness, contrast, saturation, hue, gray, blurred, sigma, inverted = uniforms[
    2 * _TRIES + 2 :
  ]
  adjustments = ()
  if jitter < views.jitter:
    strengths = (views.brightness, views.contrast, views.saturation, views.hue)
    factors = (
      _between(brightness, max(0.0, 1.0 - views.brightness), 1.0 + views.brightness),
      _between(contrast, max(0.0, 1.0 - views.contrast), 1.0 + views.contrast),
      _between(saturation, max(0.0, 1.0 - views.saturation), 1.0 + views.saturation),
      _between(hue, -views.hue, views.hue),
    )
    adjustments = tuple((which, factors[which]) for which in _ORDERS[int(order * len(_ORDERS))] if strengths[which] > 0)
  return Crop(
    *box,
    flip=flip < views.flip,
    jitter=adjustments,
    grayscale=gray < views.grayscale,
    sigma=_between(sigma, *views.blur_sigma) if blurred < blur else None,
    solarize=inverted < solarize,
  )


def _draw_box(uniforms: list[float], height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
  """A crop box (top, left, height, width): area uniform in `scale`, log-uniform aspect, uniform place.

  After ten proposals that do not fit, the largest centred box whose aspect ratio is allowed.
  """
  for proposal in range(_TRIES):
    area = height * width * _between(uniforms[2 * proposal], *scale)
    ratio = math.exp(_between(uniforms[2 * proposal + 1], *_LOG_RATIO))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      return int(uniforms[2 * _TRIES] * (height - h + 1)), int(uniforms[2 * _TRIES + 1] * (width - w + 1)), h, w
  low, high = 3.0 / 4.0, 4.0 / 3.0
  w, h = width, height
  if width / height < low:
    h = round(width / low)
  elif width / height > high:
    w = round(height * high)
  return (height - h) // 2, (width - w) // 2, h, w


def _between(uniform: float, low: float, high: float) -> float:
  return low + uniform * (high - low)


def apply_crop(image: Image.Image, crop: Crop, size: int) -> UInt8[np.ndarray, "size size 3"]:
  """Cuts `crop` out of an RGB image, resized to size x size, and distorts it as drawn."""
  image = operations.crop_and_resize(image, crop.top, crop.left, crop.height, crop.width, size)
  for which, factor in crop.jitter:
    image = operations.ADJUSTMENTS[which](image, factor)
  if crop.grayscale:
    image = operations.grayscale(image)
  pixels = np.asarray(image)  # [size, size, 3]
  if crop.sigma is not None:
    pixels = operations.gaussian_blur(pixels, crop.sigma)
  if crop.solarize:
    pixels = operations.solarize(pixels)
  # Nothing above knows left from right, so that the flip can come last, where it is only another way to read.
  return pixels[:, ::-1] if crop.flip else pixels


def multi_crop(
  image: UInt8[np.ndarray, "H W 3"],
  rng: np.random.Generator,
  views: Views,
  global_crops: UInt8[np.ndarray, "2 G G 3"],
  local_crops: UInt8[np.ndarray, "L l l 3"],
):
  """Draws the crops of an image and writes them into the two given arrays."""
  crops = draw_crops(rng, image.shape[0], image.shape[1], views)
  source = Image.fromarray(image)
  for out, crop in zip(global_crops, crops[:2], strict=True):
    out[...] = apply_crop(source, crop, views.global_size)
  for out, crop in zip(local_crops, crops[2:], strict=True):
    out[...] = apply_crop(source, crop, views.local_size)
