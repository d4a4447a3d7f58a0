"""The views of DINO's methods from a config: global and local crops, block masks on the global ones."""

from __future__ import annotations

from typing import Any

from vit_jax.config.schema import loss_group_size
from vit_jax.data.bands import image_channels
from vit_jax.data.views import MultiCrop

RGB_ONLY = ("saturation", "hue", "grayscale")  # keys of `augment` without a meaning for other images


def build_views(config: Any, stride: int) -> MultiCrop:
  """What the data must make for a method with global and local crops and masks.

  Args:
    config: the resolved config.
    stride: pixels between neighbouring patch tokens of the backbone.

  Raises:
    ValueError: naming the key, if a crop is not a whole number of patches.
  """
  crops = config.crops
  sizes = {f"crops.{key}={crops[key]}": crops[key] for key in ("global_size", "local_size", "gram_size")}
  sizes |= {f"crops.resolutions={crops.resolutions}: {size}": size for row in crops.resolutions for size in row[:3]}
  for given, size in sizes.items():
    if size is not None and size % stride:
      near = max(round(size / stride), 1) * stride
      raise ValueError(
        f"{given}: must be a multiple of {stride}, the pixels between two patch tokens of {config.model.name} (a ViT's "
        f"model.patch_size), for example {near}."
      )
  side = config.crops.global_size // stride
  photometric = {key: value for key, value in config.augment.items() if key not in ("mean", "std")}
  channels = image_channels(config.model.in_channels)
  if channels != 3:
    photometric |= dict.fromkeys(RGB_ONLY, 0.0)
  return MultiCrop(
    **config.crops,
    **photometric,
    stride=stride,
    channels=channels,
    value_range=config.data.value_range,
    mask_grid=(side, side),
    mask_probability=config.ibot.mask_probability,
    mask_ratio=config.ibot.mask_ratio,
    mask_shift=config.ibot.mask_shift,
    loss_group_size=loss_group_size(config),
  )
