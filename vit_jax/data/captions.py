"""What was drawn for a crop, in a few words: the captions of `vit-jax data preview`."""

from __future__ import annotations

from vit_jax.data.augment import Colours, Crop
from vit_jax.data.sources import Source

_ADJUSTMENTS = ("brightness", "contrast", "saturation", "hue")  # as numbered in `operations.ADJUSTMENTS`


def crop_caption(crop: Crop, height: int, width: int) -> list[str]:
  """The parameters of a crop of an image of this size, one thing a line."""
  lines = [
    f"{crop.width} x {crop.height} at ({crop.left}, {crop.top})",
    f"{crop.height * crop.width / (height * width):.0%} of the image",
  ]
  if crop.window is not None:
    lines = [f"window at ({crop.window[1]}, {crop.window[0]})", "of the global crop"]
  if crop.flip:
    lines.append("flipped")
  lines += colour_caption((crop.jitter, crop.grayscale))
  if crop.sigma is not None:
    lines.append(f"blur, sigma {crop.sigma:.2f}")
  if crop.solarize:
    lines.append("solarized")
  return lines


def label_caption(source: Source, label: int) -> str:
  """The class of an image by its name."""
  return f"class {source.class_names[label]}" if label >= 0 else "no label"


def colour_caption(colours: Colours) -> list[str]:
  """Jitter, in the order in which it is applied, and grayscale."""
  jitter, grayscale = colours
  lines = [f"{_ADJUSTMENTS[which]} {factor:{'+.3f' if which == 3 else '.2f'}}" for which, factor in jitter]
  return lines + ["grey"] * grayscale
