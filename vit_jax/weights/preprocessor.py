"""The preprocessor_config.json of Hugging Face: how images are made ready for a model, said to others and by them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vit_jax.weights.errors import WeightsError

RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
_VALUE_RANGE = "vit_jax_value_range"  # a key of our own
_LEGACY = "DINOv3ViTImageProcessorFast"  # what our exports once said, whatever had been evaluated

# What a class does where its file does not say it: resampling, whether an int as size is that of a square, and whether
# it crops. Others must say it.
_CLASSES = {
  "ViT": (2, True, False),
  "DINOv3ViT": (2, True, False),
  "DeiT": (3, True, True),
  "Beit": (3, True, False),
  "Siglip": (3, True, False),
  "Bit": (3, False, True),
  "CLIP": (3, False, True),
  "ConvNext": (2, False, False),
}
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
_HARMLESS = ("do_reduce_labels", "do_basic_tokenize")  # not about pixels
# Settings that change pixels in ways that are not followed here.
_OTHERS = ("offset", "rescale_offset", "include_top", "size_divisor", "size_divisibility", "ensure_multiple_of",
           "keep_aspect_ratio", "max_num_patches", "max_patches", "patch_size", "longest_edge")  # fmt: skip

_log = logging.getLogger(__name__)


class Frame(NamedTuple):
  """How an image of any shape becomes one of the size that a model takes.

  Attributes:
    resize: pixels of the short side; or height and width, whatever the shape was; None: not resized.
    crop: height and width that are cut out of the centre; None: all of it.
    resample: one of `RESAMPLES`.
  """

  resize: int | tuple[int, int] | None
  crop: tuple[int, int] | None
  resample: str


class Preprocessor(NamedTuple):
  """What is said of the images of a model.

  Attributes:
    mean, std: of the channels, of values in [0, 1].
    image_size: side of the images in pixels.
    value_range: of images that do not have 8 bits; None: not said.
    frame: how they come to that size; None: not said.
    problem: what is said and cannot be followed, for people; "": nothing.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  image_size: int
  value_range: tuple[float, ...] | None = None
  frame: Frame | None = None
  problem: str = ""


def to_preprocessor(
  mean: Sequence[float], std: Sequence[float], frame: Frame, value_range: Sequence[float] | None = None
) -> dict[str, Any]:
  """The preprocessor_config.json that goes with a model; a range of values of its images is a key of our own."""
  own = {} if value_range is None else {_VALUE_RANGE: list(value_range)}
  size = {} if frame.resize is None else {"size": _size(frame.resize)}
  crop = {} if frame.crop is None else {"crop_size": dict(zip(("height", "width"), frame.crop, strict=True))}
  return own | size | crop | dict(
    image_processor_type="BitImageProcessor",
    do_convert_rgb=len(mean) == 3,
    do_resize=frame.resize is not None,
    resample=RESAMPLES.index(frame.resample),
    do_center_crop=frame.crop is not None,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=list(mean),
    image_std=list(std),
    data_format="channels_first",
  )  # fmt: skip


def from_preprocessor(values: Mapping[str, Any], *, ours: bool = False) -> Preprocessor:
  """What a preprocessor_config.json says.

  Args:
    values: its content.
    ours: whether it is in a file that only vit_jax writes.

  Raises:
    WeightsError: if it lacks what every such file has.
  """
  kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
  stem = re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", kind)
  defaults = _CLASSES.get(stem)
  try:
    frame, problem = _frame(values, stem, defaults)
    mean, std = _normalization(values)
    value_range = tuple(values[_VALUE_RANGE]) if _VALUE_RANGE in values else None
    side = _side(values)
  except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
    raise WeightsError(f"the preprocessor_config.json cannot be read: {type(error).__name__} {error}.") from error
  if side is None and frame is not None:
    side = frame.crop or frame.resize
    side = side if isinstance(side, int) or side is None else side[0]
  if side is None:
    raise WeightsError("the preprocessor_config.json lacks a size.")
  if is_legacy(values, ours):
    frame, problem = None, ""
  return Preprocessor(mean, std, side, value_range, frame, problem)


def is_legacy(values: Mapping[str, Any], ours: bool) -> bool:
  """Whether a preprocessor_config.json is one of an older version of vit_jax, which do not say what was evaluated."""
  return ours and values.get("image_processor_type") == _LEGACY and "do_center_crop" not in values


def _frame(
  values: Mapping[str, Any], stem: str, defaults: tuple[int, bool, bool] | None
) -> tuple[Frame | None, str]:
  """How images are resized and cropped, or what of it cannot be followed."""
  steps = [key for key, value in values.items() if key.startswith("do_") and value and key not in _HARMLESS]
  problems = [f"{key}={values[key]!r}" for key in steps if key not in _STEPS]
  problems += [f"{key}={values[key]!r}" for key in _OTHERS if values.get(key)]
  if "crop_pct" in values and values["crop_pct"] is not None and stem != "ConvNext":
    problems.append(f"crop_pct={values['crop_pct']!r}")
  resample = values.get("resample", defaults[0] if defaults else None)
  resizes, crops = values.get("do_resize", True), values.get("do_center_crop", bool(defaults and defaults[2]))
  if resizes and (not isinstance(resample, int) or not 0 <= resample < len(RESAMPLES)):
    problems.append(f"resample={resample!r}")
  if problems:
    return None, ", ".join(problems)
  name = RESAMPLES[resample] if resizes else "bicubic"
  if resizes and stem == "ConvNext":
    return _convnext_frame(values, name), ""
  resize = None
  if resizes:
    resize = _resize(values["size"], values.get("default_to_square", defaults[1] if defaults else None))
    if resize is None:
      return None, f"size={values['size']!r}"
  return Frame(resize, _pair(values["crop_size"]) if crops else None, name), ""


def _resize(size: Any, square: bool | None) -> int | tuple[int, int] | None:
  """What `size` means; None: nothing that is followed."""
  if isinstance(size, int):
    return None if square is None else (size, size) if square else size
  if isinstance(size, list | tuple):
    return tuple(size) if len(size) == 2 else None
  said = {key for key, value in size.items() if value is not None}
  if said == {"shortest_edge"}:
    return int(size["shortest_edge"])
  return (int(size["height"]), int(size["width"])) if said == {"height", "width"} else None


def _convnext_frame(values: Mapping[str, Any], name: str) -> Frame:
  """Below 384 pixels the short side is 1 / crop_pct of the crop; from there on images are squeezed into a square."""
  side = values["size"] if isinstance(values["size"], int) else values["size"]["shortest_edge"]
  if side >= 384:
    return Frame((side, side), None, name)
  return Frame(int(side / (values.get("crop_pct") or 224 / 256)), (side, side), name)


def _normalization(values: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation of values in [0, 1] that do what the file says with values of 0 to 255."""
  mean, std = (0.0,) * 3, (1.0,) * 3
  if values.get("do_normalize", True):
    mean, std = (_channels(values[key]) for key in ("image_mean", "image_std"))
  factor = 255 * (values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1.0)
  if math.isclose(factor, 1.0, rel_tol=1e-6):
    return mean, std
  return tuple(value / factor for value in mean), tuple(value / factor for value in std)


def _channels(value: Any) -> tuple[float, ...]:
  return (float(value),) * 3 if isinstance(value, int | float) else tuple(value)


def _side(values: Mapping[str, Any]) -> int | None:
  """The side of the images, of whatever kind they are: the height, where it is not the width."""
  size = values.get("crop_size") if values.get("do_center_crop") else values.get("size")
  if isinstance(size, int) or size is None:
    return size
  if isinstance(size, list | tuple):
    return int(size[0])
  keys = ("height", "shortest_edge", "longest_edge", "max_height")
  return next((int(size[key]) for key in keys if size.get(key)), None)


def _size(resize: int | tuple[int, int]) -> dict[str, int]:
  return {"shortest_edge": resize} if isinstance(resize, int) else {"height": resize[0], "width": resize[1]}


def _pair(size: Any) -> tuple[int, int]:
  if isinstance(size, int):
    return size, size
  return (int(size["height"]), int(size["width"])) if isinstance(size, Mapping) else tuple(size)
