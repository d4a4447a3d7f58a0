"""What a backbone takes: images of its number of channels, each channel normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.images import normalize_images


def check_images(images: Array, channels: int, patch_size: int = 1, *, whole: bool = True) -> None:
  """Raises a ValueError unless images [B, H, W, C] can be those of a model.

  Args:
    images: that are to be normalised floats.
    channels: that they must have.
    patch_size: of which height and width must be multiples: pixels beyond the last whole patch would not be seen.
    whole: False: they need not be, as where parameters are made, for which any size serves.
  """
  shape = tuple(images.shape)
  if len(shape) != 4:
    batch = " A batch of one image: images[None]." if len(shape) == 3 else ""
    raise ValueError(f"images must be [batch, height, width, channels], got an array of shape {list(shape)}.{batch}")
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"the images are of type {images.dtype} and the model takes normalised floats, (x / 255 - mean) / std: see "
      "vit_jax.load_images."
    )
  if shape[-1] != channels and shape[1] == channels:
    raise ValueError(
      f"images must be [batch, height, width, channels], got {list(shape)}, with the channels first: give it "
      "images.transpose(0, 2, 3, 1)."
    )
  if shape[-1] != channels:
    raise ValueError(
      f"the images have {images.shape[-1]} channels and the model takes {channels}: give it such images, or make it "
      f"with in_channels={images.shape[-1]} (model.in_channels)."
    )
  height, width = shape[1:3]
  if min(height, width) < patch_size:
    raise ValueError(f"images of {height}x{width} pixels are smaller than one patch of {patch_size}.")
  if whole and (height % patch_size or width % patch_size):
    below = [side // patch_size * patch_size for side in (height, width)]
    raise ValueError(
      f"images of {height}x{width} pixels are no whole patches of {patch_size}: crop or resize them to such, as "
      f"{below[0]}x{below[1]} (vit_jax.load_images with size=…)."
    )


def prepare_images(model: Any, images: Array, mean: Sequence[float], std: Sequence[float]) -> Float[Array, "B H W C"]:
  """uint8 images as `model` takes them: grey where it has one channel, (x / 255 - mean) / std per channel.

  Raises:
    ValueError: if mean and std are not those of the model's channels.
  """
  channels = getattr(model, "in_channels", len(mean))
  if not len(mean) == len(std) == channels:
    raise ValueError(
      f"mean={tuple(mean)} and std={tuple(std)} are not those of a model that takes {channels} channels: give an entry "
      "for each. A weight file that does not say with which mean and std it was trained counts as one of ImageNet."
    )
  return normalize_images(images, mean, std)
