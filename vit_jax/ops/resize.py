"""Resizing of feature maps with PyTorch's semantics, as fixed interpolation matrices."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
  x = np.abs(distance)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _linear(distance: np.ndarray, _: float) -> np.ndarray:
  return np.maximum(1 - np.abs(distance), 0.0)


def resize_matrix(size_in: int, size_out: int, *, method: str, antialias: bool, offset: float = 0.0) -> np.ndarray:
  """Interpolation weights [size_out, size_in], half-pixel centres (PyTorch's align_corners=False).

  Without antialiasing the bicubic kernel has a = -0.75 and taps outside are clamped to the edge; with it a = -0.5, the
  kernel widens by the scale when shrinking and weights are renormalised at the border (jax.image's "cubic" is neither
  of these by default). The scale is size_in / (size_out + offset).

  Raises:
    ValueError: for a method other than "bicubic" and "bilinear".
  """
  if method not in ("bicubic", "bilinear"):
    raise ValueError(f'method must be "bicubic" or "bilinear", got {method!r}.')
  kernel, support = (_cubic, 2.0) if method == "bicubic" else (_linear, 1.0)
  scale = size_in / (size_out + offset)
  centres = (np.arange(size_out) + 0.5) * scale - 0.5  # [out]
  if antialias:
    stretch = max(scale, 1.0)
    distance = (np.arange(size_in)[None] - centres[:, None]) / stretch  # [out, in]
    weights = np.where(np.abs(distance) < support, kernel(distance, -0.5), 0.0)
    return weights / weights.sum(1, keepdims=True)
  weights = np.zeros((size_out, size_in))
  base = np.floor(centres).astype(int)
  for tap in range(1 - int(support), int(support) + 1):
    index = base + tap
    value = kernel(centres - index, -0.75)  # [out]
    np.add.at(weights, (np.arange(size_out), np.clip(index, 0, size_in - 1)), value)
  return weights


def resize_map(
  features: Float[Array, "B h w D"],
  size: tuple[int, int],
  *,
  method: str = "bicubic",
  antialias: bool = False,
  offset: float = 0.0,
) -> Float[Array, "B H W D"]:
  """Resizes a feature map to `size` = (H, W) in float32; the gram teacher's maps use the defaults (DINOv3 3.6)."""
  words = "resize_map takes feature maps [B, h, w, D], floats"
  chex.assert_rank(features, 4, custom_message=words, exception_type=ValueError)
  chex.assert_type(features, float, custom_message=words, exception_type=ValueError)
  dtype = jnp.promote_types(features.dtype, jnp.float32)
  how = {"method": method, "antialias": antialias, "offset": offset}
  rows = jnp.asarray(resize_matrix(features.shape[1], size[0], **how), dtype)
  columns = jnp.asarray(resize_matrix(features.shape[2], size[1], **how), dtype)
  return jnp.einsum("Hh,Ww,bhwd->bHWd", rows, columns, features.astype(dtype), optimize="optimal")
