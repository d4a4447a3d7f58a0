"""What the config.json of a timm model says that its tensors do not: the images that it was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vit_jax.weights.errors import WeightsError, shown
from vit_jax.weights.grids import ImageSize
from vit_jax.weights.preprocessor import RESAMPLES, Frame, Preprocessor


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


def check_architecture(config: Mapping[str, Any], *, rotary: bool) -> None:
  """Raises a WeightsError for the models by whose names timm says what their tensors do not.

  Args:
    config: timm's config.json.
    rotary: whether the tensors are those of a model with rotary positions, which are taken for DINOv3's.
  """
  name = config.get("architecture")
  if not isinstance(name, str):
    return
  wrong = ["a QuickGELU"] if "quickgelu" in name else []
  wrong += ["rotary positions of its own"] if rotary and "dinov3" not in name else []
  if wrong:
    raise WeightsError(f"its config.json says architecture={shown(name)!r}, which has {wrong[0]}: it is not read.")


def preprocessor(config: Mapping[str, Any]) -> Preprocessor | None:
  """How images are made ready for the model of timm's config.json; None: not said."""
  named = config.get("pretrained_cfg")
  if not isinstance(named, Mapping) or not all(_is_numbers(named.get(key)) for key in ("mean", "std")):
    return None
  if not _is_sizes(named.get("input_size"), 3):
    return None
  _, height, width = named["input_size"]
  name, mode, ratio = named.get("interpolation"), named.get("crop_mode", "center"), named.get("crop_pct") or 0.875
  shown = {"interpolation": name, "crop_mode": mode, "input_size": named["input_size"]}
  wrong = [] if name in RESAMPLES else ["interpolation"]
  wrong += [] if mode in ("center", "squash") else ["crop_mode"]
  wrong += ["input_size"] if mode == "center" and height != width else []
  frame = None
  if not wrong:
    resize = (math.floor(height / ratio), math.floor(width / ratio))
    frame = Frame(resize if mode == "squash" else resize[0], (height, width), name)
  problem = ", ".join(f"{key}={shown[key]!r}" for key in wrong)
  return Preprocessor(tuple(named["mean"]), tuple(named["std"]), height, None, frame, problem)


def _is_numbers(value: Any) -> bool:
  return isinstance(value, list | tuple) and all(isinstance(number, int | float) for number in value)


def _is_sizes(value: Any, count: int) -> bool:
  return isinstance(value, list | tuple) and len(value) == count and all(isinstance(side, int) for side in value)
