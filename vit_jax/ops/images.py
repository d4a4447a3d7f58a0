"""Image arrays on the device."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8


def normalize_images(images: Array, mean: Sequence[float], std: Sequence[float]) -> Float[Array, "... H W C"]:
  """(x / 255 - mean) / std per channel for uint8 images, in float32; floats are taken as normalised already.

  RGB images become grey where mean and std are those of one channel.

  Raises:
    ValueError: if mean and std are not those of the images' channels.
  """
  if images.dtype != jnp.uint8:
    return images
  if len(mean) == 1 and images.shape[-1] == 3:
    images = grey(images)
  if not len(mean) == len(std) == images.shape[-1]:
    raise ValueError(
      f"augment.mean={tuple(mean)}: mean and std (augment.std={tuple(std)}) must have an entry for each of the "
      f"{images.shape[-1]} channels of the images."
    )
  scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))  # [C]
  offset = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)  # [C]
  return images.astype(jnp.float32) * scale - offset


def grey(images: UInt8[Array, "... 3"]) -> UInt8[Array, "... 1"]:
  """RGB as grey (ITU-R 601 luma), in the integers that PIL computes with."""
  words = "grey takes images [..., 3] of uint8 levels"
  chex.assert_axis_dimension(images, -1, 3, custom_message=words, exception_type=ValueError)
  chex.assert_type(images, jnp.uint8, custom_message=words, exception_type=ValueError)
  return luma(images).astype(jnp.uint8)[..., None]


def luma(images: Array) -> Int32[Array, " ..."]:
  """Luma (ITU-R 601) of RGB levels [..., 3] of any type, in the integers that PIL computes with."""
  red, green, blue = jnp.moveaxis(images.astype(jnp.int32), -1, 0)
  return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
