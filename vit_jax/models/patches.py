"""Cutting images, or maps, into patches and embedding each of them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from vit_jax.models.layers import fan_in_uniform, spread


class PatchEmbed(nn.Module):
  """Linear embedding of non-overlapping patches.

  Attributes:
    patch_size: side of a patch in pixels.
    width: channels of the embedding.
    use_bias: whether it has a bias.
    kernel_init, bias_init: None: as PyTorch initialises convolutions.
  """

  patch_size: int
  width: int
  dtype: Any
  param_dtype: Any
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer | None = None
  bias_init: nn.initializers.Initializer | None = None

  @nn.compact
  def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B N D"]:
    batch, height, width, channels = images.shape
    p, h, w = self.patch_size, height // self.patch_size, width // self.patch_size
    default = fan_in_uniform(channels * p * p)
    kernel = self.param("kernel", self.kernel_init or default, (p, p, channels, self.width), self.param_dtype)
    patches = images[:, : h * p, : w * p].reshape(batch, h, p, w, p, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, h * w, p * p * channels)  # [B, N, p*p*C]
    kernel = nn.with_logical_constraint(kernel.reshape(-1, self.width).astype(self.dtype), (None, "width"))
    embedded = patches.astype(self.dtype) @ kernel  # [B, N, D]
    if not self.use_bias:
      return embedded
    bias = self.param("bias", self.bias_init or default, (self.width,), self.param_dtype)
    return embedded + spread(bias, embedded.shape, embedded.dtype)
