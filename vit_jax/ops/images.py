"""Image arrays on the device."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float


def normalize_images(images: Array, mean: Sequence[float], std: Sequence[float]) -> Float[Array, "... H W C"]:
  """(x / 255 - mean) / std per channel for uint8 images, in float32; floats are taken as normalised already."""
  if images.dtype != jnp.uint8:
    return images
  scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))  # [C]
  offset = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)  # [C]
  return images.astype(jnp.float32) * scale - offset
