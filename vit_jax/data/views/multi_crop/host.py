"""Multi-crop augmentation on the host: draw the parameters of every crop of an image, then apply them.

Drawing and applying are apart, so that a recorded draw can be replayed and the distributions be tested without images.
The order within a crop: random resized crop, horizontal flip, colour jitter, grayscale, blur, solarize.

Gram crops show what the global crops show, at another size: the region is cut out once, at the larger of the two sizes,
and both are resized from that. With `local_inside_global` the local crops are windows of the global crops, distorted by
themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from vit_jax.data import operations
from vit_jax.data.operations import Pixels
from vit_jax.data.resampling import Planes, crop_and_resize, planes, resize
from vit_jax.data.views.multi_crop.parameters import NUM_GLOBAL, Parameters

TRIES = 10  # proposals for a crop box before the centre crop
LOG_RATIO = (math.log(3.0 / 4.0), math.log(4.0 / 3.0))  # a box's aspect ratio is log-uniform in this range
ORDERS = tuple(itertools.permutations(range(4)))  # of the four colour adjustments
PLACES = 2 * TRIES + 2  # random numbers for a box: proposals, then its place
COLOURS = 7  # random numbers for jitter and grayscale
UNIFORMS = PLACES + 4 + COLOURS  # random numbers of one crop


Colours = tuple[tuple[tuple[int, float], ...], bool]  # (jitter, grayscale), as in `Crop`


class Crop(NamedTuple):
  """Everything that was drawn for one crop.

  `jitter` holds (which of `operations.ADJUSTMENTS`, its factor) in the order of application; `sigma` is None without a
  blur. `window` is the place (top, left) of a local crop inside a global one, in pixels of the flipped global crop,
  whose box and flip the crop then has; None: a crop of the image.
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
  window: tuple[int, int] | None = None


def draw_crops(rng: np.random.Generator, height: int, width: int, views: Parameters) -> list[Crop]:
  """Draws the crops of an image of this size: first global, second global, then the local ones.

  A fixed number of random numbers is drawn whatever the image and the outcome, all at once: a call of the generator
  for each would cost more than the rest.
  """
  uniforms = rng.random((NUM_GLOBAL + views.local_number, UNIFORMS)).tolist()
  boxes = [_draw_box(row, height, width, views.global_scale) for row in uniforms[:NUM_GLOBAL]]
  crops = [_draw_crop(row, views, i, box) for i, (row, box) in enumerate(zip(uniforms, boxes, strict=False))]
  for i, row in enumerate(uniforms[NUM_GLOBAL:]):
    if views.local_inside_global:
      base = crops[2 * i // views.local_number]  # the first half lies in the first global crop
      local = _draw_crop(row, views, 2, base[:4])._replace(flip=base.flip, window=_draw_window(row, views))
    else:
      local = _draw_crop(row, views, 2, _draw_box(row, height, width, views.local_scale))
    crops.append(local)
  return crops


def random_numbers(rng: np.random.Generator, views: Parameters) -> Float32[np.ndarray, "R U"]:
  """The numbers from which `multi_crop` would draw: a row for each crop and, with `share_color_jitter`, one for all."""
  numbers = np.zeros(random_shape(views), np.float32)
  numbers[: NUM_GLOBAL + views.local_number] = rng.random((NUM_GLOBAL + views.local_number, UNIFORMS))
  if views.share_color_jitter:
    numbers[-1, :COLOURS] = rng.random(COLOURS)
  return numbers


def random_shape(views: Parameters) -> tuple[int, int]:
  """Of the random numbers of one image."""
  return NUM_GLOBAL + views.local_number + views.share_color_jitter, UNIFORMS


def draw_colours(rng: np.random.Generator, views: Parameters) -> tuple[tuple[tuple[int, float], ...], bool]:
  """Draws (jitter, grayscale), as in `Crop`, for a whole image."""
  return _colours(rng.random(COLOURS).tolist(), views)


def _draw_crop(uniforms: list[float], views: Parameters, kind: int, box: tuple[int, int, int, int]) -> Crop:
  """A crop of this box; kind 0: first global, 1: second global, 2: local."""
  flip, *colours, blurred, sigma, inverted = uniforms[PLACES:]
  jitter, grayscale = ((), False) if views.share_color_jitter else _colours(colours, views)
  return Crop(
    *box,
    flip=flip < views.flip,
    jitter=jitter,
    grayscale=grayscale,
    sigma=_between(sigma, *views.blur_sigma) if blurred < views.blur[kind] else None,
    solarize=inverted < views.solarize[kind],
  )


def _colours(uniforms: list[float], views: Parameters) -> tuple[tuple[tuple[int, float], ...], bool]:
  jitter, order, brightness, contrast, saturation, hue, gray = uniforms
  if jitter >= views.jitter:
    return (), gray < views.grayscale
  strengths = (views.brightness, views.contrast, views.saturation, views.hue)
  factors = (
    _between(brightness, max(0.0, 1.0 - views.brightness), 1.0 + views.brightness),
    _between(contrast, max(0.0, 1.0 - views.contrast), 1.0 + views.contrast),
    _between(saturation, max(0.0, 1.0 - views.saturation), 1.0 + views.saturation),
    _between(hue, -views.hue, views.hue),
  )
  which = ORDERS[int(order * len(ORDERS))]
  return tuple((i, factors[i]) for i in which if strengths[i] > 0), gray < views.grayscale


def _draw_window(uniforms: list[float], views: Parameters) -> tuple[int, int]:
  """The place (top, left) of a local crop inside a global one: a multiple of the stride.

  As in the reference, the last place that would fit is never drawn; the only one, where the reference fails, is.
  """
  places = max(1, (views.global_size - views.local_size) // views.stride)
  top, left = (views.stride * int(uniform * places) for uniform in uniforms[PLACES - 2 : PLACES])
  return top, left


def draw_box(
  rng: np.random.Generator, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
  """A crop box (top, left, height, width) of an image; see `_draw_box`."""
  return _draw_box(rng.random(PLACES).tolist(), height, width, scale)


def _draw_box(uniforms: list[float], height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
  """A crop box (top, left, height, width): area uniform in `scale`, log-uniform aspect, uniform place.

  After ten proposals that do not fit, the largest centred box whose aspect ratio is allowed.
  """
  for proposal in range(TRIES):
    area = height * width * _between(uniforms[2 * proposal], *scale)
    ratio = math.exp(_between(uniforms[2 * proposal + 1], *LOG_RATIO))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      return int(uniforms[PLACES - 2] * (height - h + 1)), int(uniforms[PLACES - 1] * (width - w + 1)), h, w
  low, high = 3.0 / 4.0, 4.0 / 3.0
  w, h = width, height
  if width / height < low:
    h = round(width / low)
  elif width / height > high:
    w = round(height * high)
  return (height - h) // 2, (width - w) // 2, h, w


def _between(uniform: float, low: float, high: float) -> float:
  return low + uniform * (high - low)


def apply_crop(image: Planes, crop: Crop, size: int) -> UInt8[np.ndarray, "size size C"]:
  """Cuts `crop` out of an image, resized to size x size, and distorts it as drawn."""
  return operations.flip(_distorted(_cut(image, crop, size), crop), crop.flip)


def apply_crops(
  image: Planes,
  crops: Sequence[Crop],
  views: Parameters,
  global_crops: UInt8[np.ndarray, "2 G G C"],
  local_crops: UInt8[np.ndarray, "L l l C"],
  gram_crops: UInt8[np.ndarray, "2 Gg Gg C"] | None = None,
):
  """Writes the crops of an image, drawn by `draw_crops`, into the given arrays; without one, no gram crops.

  In two details this is not what the reference does. It resizes distorted gram crops as normalised floats, without
  cutting what overshoots; here they are 8-bit images all along. And it cuts windows out of the region before that has
  the size of the global crops, so that with larger gram crops they come from its top left corner only; here they come
  from the global crop.
  """
  plain = []  # the two global crops, neither distorted nor flipped
  for i, crop in enumerate(crops[:NUM_GLOBAL]):
    base = _cut(image, crop, views.base_size)
    plain.append(resize(base, views.global_size))
    shared = gram_crops is not None and views.gram_distortions
    if shared:
      base = _distorted(base, crop)
      pixels = resize(base, views.global_size)
    else:
      pixels = _distorted(plain[i], crop)
    # The flip comes last, where it is cheapest: nothing before it knows left from right.
    global_crops[i] = operations.flip(pixels, crop.flip)
    if gram_crops is not None:
      gram_crops[i] = operations.flip(resize(base, views.gram_size), crop.flip)
  for i, crop in enumerate(crops[NUM_GLOBAL:]):
    if crop.window is None:
      local_crops[i] = apply_crop(image, crop, views.local_size)
    else:
      top, left = crop.window
      whole = operations.flip(_distorted(plain[2 * i // len(local_crops)], crop), crop.flip)
      local_crops[i] = whole[top : top + views.local_size, left : left + views.local_size]


def multi_crop(
  image: UInt8[np.ndarray, "H W C"],
  rng: np.random.Generator,
  views: Parameters,
  global_crops: UInt8[np.ndarray, "2 G G C"],
  local_crops: UInt8[np.ndarray, "L l l C"],
  gram_crops: UInt8[np.ndarray, "2 Gg Gg C"] | None = None,
):
  """Draws the crops of an image and writes them into the given arrays."""
  crops = draw_crops(rng, image.shape[0], image.shape[1], views)
  if views.share_color_jitter:
    image = _coloured(image, *draw_colours(rng, views))
  apply_crops(planes(image), crops, views, global_crops, local_crops, gram_crops)


def _cut(image: Planes, crop: Crop, size: int) -> Pixels:
  return crop_and_resize(image, crop.top, crop.left, crop.height, crop.width, size)


def _coloured(pixels: Pixels, jitter: tuple[tuple[int, float], ...], grayscale: bool) -> Pixels:
  for which, factor in jitter:
    pixels = operations.ADJUSTMENTS[which](pixels, factor)
  return operations.grayscale(pixels) if grayscale else pixels


def _distorted(pixels: Pixels, crop: Crop) -> Pixels:
  pixels = _coloured(pixels, crop.jitter, crop.grayscale)
  if crop.sigma is not None:
    pixels = operations.gaussian_blur(pixels, crop.sigma)
  return operations.solarize(pixels) if crop.solarize else pixels
