"""What the config.json of a timm model says that its tensors do not: the size of the images its positions are for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_jax.weights.grids import ImageSize


def image_size(config: Mapping[str, Any]) -> ImageSize | None:
  """The size of the images in timm's config.json: as the model was made, else as its name means; None: not said."""
  made = config.get("model_args")
  size = made.get("img_size") if isinstance(made, Mapping) else None
  named = config.get("pretrained_cfg")
  if size is None and isinstance(named, Mapping) and _is_sizes(named.get("input_size"), 3):
    size = named["input_size"][1:]  # channels come first
  if isinstance(size, int):
    return ImageSize(size, size)
  return ImageSize(*size) if _is_sizes(size, 2) else None


def _is_sizes(value: Any, count: int) -> bool:
  return isinstance(value, list | tuple) and len(value) == count and all(isinstance(side, int) for side in value)
