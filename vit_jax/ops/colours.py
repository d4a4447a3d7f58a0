"""Colour operations on images of 256 levels, with the results of Pillow's 8-bit arithmetic.

Images are float32 [..., C, H, W] that hold whole numbers from 0 to 255; every function returns the same. Factors have
the shape of the leading axes. Each step cuts the fraction off where Pillow does: a chain of operations on unrounded
values would end several levels away.

Images of one channel are their own luma. Of those with another number of channels than 1 and 3 the luma is the mean;
hue and saturation mean nothing for them and leave them as they are.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax.ops.images import luma

BRIGHTNESS, CONTRAST, SATURATION, HUE, NOTHING = range(5)  # the adjustments by number

Levels = Float[Array, "... C H W"]


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
  some = jnp.maximum(chroma, 1.0)
  lack_red, lack_green, lack_blue = (value - red) / some, (value - green) / some, (value - blue) / some
  sector = jnp.where(
    red == value,
    lack_blue - lack_green,
    jnp.where(green == value, _sum(2.0, lack_red, lack_blue), _sum(4.0, lack_green, lack_red)),
  )
  position = sector / 6.0  # of the circle, from -1/6
  hue = _floor255(jnp.where(position < 0.0, position + 1.0, position))
  saturation = _floor255(chroma / jnp.maximum(value, 1.0))
  turned = jnp.mod(jnp.where(chroma > 0.0, hue, 0.0) + jnp.trunc(turns * 255.0), 256.0)
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


def _sum(whole: float, plus: Array, minus: Array) -> Array:
  """whole + plus - minus, rounded once where one of them is 0 or 1: where hues of 8 bits jump, it shows."""
  return jnp.where(minus == 1.0, (whole - minus) + plus, (whole + plus) - minus)


def _floor255(x: Array) -> Array:
  """floor(255 x), exactly: a product that rounding lifts to a whole number is taken back."""
  near = jnp.round(255.0 * x)
  above = (256.0 * x - near) - x < 0.0  # 255 x < near, by differences that are exact
  return jnp.where(above, near - 1.0, near)


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
