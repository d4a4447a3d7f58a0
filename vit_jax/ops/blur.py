"""Gaussian blur of a few taps, each image with its own width."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

RADIUS = 4  # 9 taps


def gaussian_blur(image: Float[Array, "... C H W"], sigma: Float[Array, " ..."]) -> Float[Array, "... C H W"]:
  """Gaussian blur of 9 x 9 taps with mirrored borders, rounded to whole levels, in float32.

  Args:
    image: levels.
    sigma: standard deviation in pixels, of each image; 0: the image as it is.
  """
  words = f"gaussian_blur takes images [..., C, H, W], got {image.shape}, with a sigma for each"
  chex.assert_shape(sigma, image.shape[:-3], custom_message=words, exception_type=ValueError)
  offsets = jnp.arange(-RADIUS, RADIUS + 1, dtype=jnp.float32)
  spread = jnp.maximum(sigma, 1e-3)[..., None]  # [..., 1]
  taps = jnp.exp(-0.5 * jnp.square(offsets / spread))  # [..., 9]
  taps = (taps / jnp.sum(taps, -1, keepdims=True))[..., None, None, None, :]  # [..., 1, 1, 1, 9]
  for axis in (-2, -1):
    size = image.shape[axis]
    pad = [(0, 0)] * image.ndim
    pad[axis] = (RADIUS, RADIUS)
    padded = jnp.pad(image, pad, mode="reflect")
    shifted = (jax.lax.slice_in_dim(padded, i, i + size, axis=image.ndim + axis) for i in range(2 * RADIUS + 1))
    image = sum(taps[..., i] * part for i, part in enumerate(shifted))
  return jnp.round(image)
