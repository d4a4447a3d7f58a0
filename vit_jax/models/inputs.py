"""What a backbone takes: images of its number of channels, each channel normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.images import normalize_images


def check_images(images: Array, channels: int) -> None:
  """Raises a ValueError unless images [B, H, W, C] have so many channels, and values that can be normalised ones."""
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"the images are of type {images.dtype} and the model takes normalised floats, (x / 255 - mean) / std: see "
      "vit_jax.load_images."
    )
  if images.shape[-1] != channels:
    raise ValueError(
      f"the images have {images.shape[-1]} channels and the model takes {channels}: give it such images, or make it "
      f"with in_channels={images.shape[-1]} (model.in_channels)."
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
