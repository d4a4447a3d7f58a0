"""Colour operations on images of 256 levels, with the results of Pillow's 8-bit arithmetic.

Images are float32 [..., C, H, W] that hold whole numbers from 0 to 255; every function returns the same. Factors have
the shape of the leading axes. Each step cuts the fraction off where Pillow does: a chain of operations on unrounded
values would end several levels away.

Images of one channel are their own luma. Of those with another number of channels than 1 and 3 the luma is the mean;
hue and saturation mean nothing for them and leave them as they are.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vit_jax.ops.images import luma

BRIGHTNESS, CONTRAST, SATURATION, HUE, NOTHING = range(5)  # the adjustments by number

Levels = Float[Array, "... C H W"]

# Hues of 8 bits that Pillow never reaches from below: 255 times its float32 for them ends just short of the number.
_HUES = (*range(1, 32), *range(88, 105, 4), *range(129, 150, 2), *range(153, 174, 4), 176, *range(177, 210, 4), 184)
_SHORT = [np.uint32(sum(1 << (hue - 32 * i) for hue in _HUES if hue // 32 == i)) for i in range(8)]  # bits, by hue


def adjust(
  image: Levels,
  which: Int[Array, " ..."],
  factor: Float[Array, " ..."],
  *,
  hue: bool = True,
  valid: Bool[Array, "... H W"] | None = None,
) -> Levels:
  """One colour adjustment of each image, by number.

  Args:
    image: levels.
    which: BRIGHTNESS: factor x value; CONTRAST: mean + factor x (value - mean) with the mean luma; SATURATION: luma +
      factor x (value - luma); HUE: turned by `factor` turns of the colour circle; NOTHING.
    factor: of that adjustment.
    hue: False where none of them is HUE, which costs most.
    valid: the pixels of which the mean luma is taken; None: all.
  """
  which, factor = which[..., None, None, None], factor[..., None, None, None]
  channels = image.shape[-3]
  gray = _luma(image)  # [..., 1, H, W]
  base = jnp.where(which == CONTRAST, _mean(gray, valid), gray)
  base = jnp.where(which == BRIGHTNESS, 0.0, base)
  blends = (which == BRIGHTNESS) | (which == CONTRAST) | ((which == SATURATION) & (channels in (1, 3)))
  blended = jnp.floor(jnp.clip(base + jnp.where(blends, factor, 1.0) * (image - base), 0.0, 255.0))
  if not hue or channels != 3:
    return blended
  return jnp.where(which == HUE, turn_hue(image, factor), blended)


def grayscale(image: Levels) -> Levels:
  """The luma in every channel."""
  return jnp.broadcast_to(_luma(image), image.shape)


def solarize(image: Levels) -> Levels:
  """Inverts the values from 128 on."""
  return jnp.where(image >= 128.0, 255.0 - image, image)


def turn_hue(image: Float[Array, "... 3 H W"], turns: Float[Array, " ..."]) -> Float[Array, "... 3 H W"]:
  """Turns the colour circle, in hue, saturation and value of 8 bits each; `turns` broadcasts against [..., 1, H, W]."""
  red, green, blue = (image[..., i : i + 1, :, :] for i in range(3))  # [..., 1, H, W]
  value, lowest = jnp.maximum(jnp.maximum(red, green), blue), jnp.minimum(jnp.minimum(red, green), blue)
  chroma = value - lowest
  sixths = jnp.where(
    red == value, green - blue, jnp.where(green == value, 2.0 * chroma + blue - red, 4.0 * chroma + red - green)
  )
  sixths = jnp.where(sixths < 0.0, sixths + 6.0 * chroma, sixths)  # of the circle, times the chroma
  hue, rest = _divided(85.0 * sixths, jnp.maximum(2.0 * chroma, 1.0))
  hue = jnp.where((rest == 0.0) & _falls_short(hue), hue - 1.0, hue)
  saturation, _ = _divided(255.0 * chroma, jnp.maximum(value, 1.0))
  turned = jnp.mod(hue + jnp.trunc(turns * 255.0), 256.0)
  place = turned * (6.0 / 255.0)  # of six sectors
  lacks = jnp.concatenate(  # how much of the chroma each channel lacks to the value
    [
      jnp.minimum(place - 1.0, 5.0 - place),
      jnp.maximum(1.0 - place, place - 3.0),
      jnp.maximum(3.0 - place, place - 5.0),
    ],
    axis=-3,
  )  # [..., 3, H, W]
  return jnp.floor(value + 0.5 - jnp.clip(lacks, 0.0, 1.0) * (saturation * value / 255.0))


def _divided(x: Array, by: Array) -> tuple[Array, Array]:
  """(floor(x / by), what is left), exactly, of whole numbers below 2^24: however the device rounds its divisions."""
  quotient = jnp.floor(x / by)
  rest = x - quotient * by
  quotient += jnp.where(rest >= by, 1.0, jnp.where(rest < 0.0, -1.0, 0.0))
  return quotient, x - quotient * by


def _falls_short(hue: Array) -> Bool[Array, " ..."]:
  """Whether Pillow, to which this hue comes out as a whole number but for float32, cuts it off to the one below."""
  place = hue.astype(jnp.uint32)
  word = functools.reduce(lambda rest, i: jnp.where(place < 32 * (i + 1), _SHORT[i], rest), range(6, -1, -1), _SHORT[7])
  return (word >> (place & 31)) & 1 == 1


def _luma(image: Levels) -> Float[Array, "... 1 H W"]:
  channels = image.shape[-3]
  if channels == 1:
    return image
  if channels == 3:
    return luma(jnp.moveaxis(image, -3, -1)).astype(jnp.float32)[..., None, :, :]
  return jnp.floor(jnp.mean(image, axis=-3, keepdims=True) + 0.5)


def _mean(gray: Float[Array, "... 1 H W"], valid: Bool[Array, "... H W"] | None) -> Float[Array, "... 1 1 1"]:
  """The mean over the pixels, rounded; added up as whole numbers, row by row, so that nothing is lost."""
  count = gray.shape[-1] * gray.shape[-2]
  if valid is not None:
    valid = valid[..., None, :, :]
    gray, count = jnp.where(valid, gray, 0.0), jnp.sum(valid, (-2, -1), keepdims=True)
  total = jnp.sum(gray.astype(jnp.int32), (-2, -1), keepdims=True)
  return jnp.floor(total / count + 0.5)
