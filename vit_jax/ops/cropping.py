"""Boxes of an image, resized: antialiased bicubic as Pillow's, as two products with weight matrices."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from vit_jax.ops.resize import resize_matrix

# Weights of 8 bits (a plain bfloat16 product) would change levels by 2; of 10 bits (TF32) and 16 (three bfloat16
# products) they change none that matters.
_PRECISION = jax.lax.Precision.HIGH


def to_levels(x: Float[Array, " ..."]) -> Float[Array, " ..."]:
  """The nearest of the 256 levels of an 8-bit image, as a float."""
  return jnp.clip(jnp.round(x), 0.0, 255.0)


def crop_weights(
  start: Num[Array, " ..."], extent: Num[Array, " ..."], size: int, length: int, flip: Bool[Array, " ..."] | None = None
) -> Float[Array, "... size length"]:
  """Weights with which the pixels of an axis make the `size` pixels of a crop of it.

  The kernel is cubic (a = -0.5) and widens where the crop shrinks; what lies outside the box counts for nothing, and
  the weights of each pixel add up to 1.

  Args:
    start: the box's first pixel.
    extent: its number of pixels.
    size: of the crop.
    length: of the axis.
    flip: the crop is seen in a mirror.
  """
  start, extent = jnp.asarray(start, jnp.float32)[..., None], jnp.asarray(extent, jnp.float32)[..., None]
  scale = extent / size  # [..., 1]
  place = jnp.arange(size, dtype=jnp.float32)
  if flip is not None:
    place = jnp.where(flip[..., None], size - 1 - place, place)
  centres = start + (place + 0.5) * scale - 0.5  # [..., size]
  pixels = jnp.arange(length, dtype=jnp.float32)
  x = jnp.abs(pixels - centres[..., None]) / jnp.maximum(scale, 1.0)[..., None]  # [..., size, length]
  weights = jnp.where(x <= 1.0, (1.5 * x - 2.5) * x * x + 1.0, ((2.5 - 0.5 * x) * x - 4.0) * x + 2.0)
  inside = (pixels >= start) & (pixels < start + extent)  # [..., length]
  weights = jnp.where((x < 2.0) & inside[..., None, :], weights, 0.0)
  return weights / jnp.sum(weights, -1, keepdims=True)


def resample(
  images: Float[Array, "B C H W"], rows: Float[Array, "B K h H"], columns: Float[Array, "B K w W"]
) -> Float[Array, "B K C h w"]:
  """K crops of each image by the weights of their rows and columns, in levels.

  Between the two products values are rounded to levels, as Pillow does, whose overshoots end there, too.
  """
  words = f"resample takes images [B, C, H, W], got {images.shape}, with weights [B, K, h, H] and [B, K, w, W]"
  batch, _, height, width = images.shape
  chex.assert_shape(rows, (batch, None, None, height), custom_message=words, exception_type=ValueError)
  chex.assert_shape(columns, (batch, rows.shape[1], None, width), custom_message=words, exception_type=ValueError)
  half = to_levels(jnp.einsum("bcyx,bkwx->bkcyw", images, columns, precision=_PRECISION))
  return to_levels(jnp.einsum("bkcyw,bkhy->bkchw", half, rows, precision=_PRECISION))


def resize(images: Float[Array, "... H W"], size: int) -> Float[Array, "... size size"]:
  """Whole images at another size, in levels."""
  height, width = images.shape[-2:]
  if (height, width) == (size, size):
    return images
  rows, columns = (jnp.asarray(resize_matrix(n, size, method="bicubic", antialias=True)) for n in (height, width))
  half = to_levels(jnp.einsum("...yx,wx->...yw", images, columns.astype(jnp.float32), precision=_PRECISION))
  return to_levels(jnp.einsum("...yw,hy->...hw", half, rows.astype(jnp.float32), precision=_PRECISION))
