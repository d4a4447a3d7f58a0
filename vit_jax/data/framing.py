"""How an image of any shape becomes one of the size that a model takes: resized, cut out of its centre."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vit_jax.data.bands import picture
from vit_jax.data.resampling import KERNELS, resize_window

CROP_RATIO = 224 / 256  # of the short side, which the centre crop has in evaluations


@dataclasses.dataclass(frozen=True)
class Framing:
  """Resizing and centre crop.

  Attributes:
    resize: pixels of the short side, the other in proportion, rounded down; or height and width, whatever the shape
      was; None: not resized.
    crop: height and width that are cut out of the centre, black where there is no image; None: all of it.
    resample: Pillow's name of the filter, antialiased where the image shrinks.
  """

  resize: int | tuple[int, int] | None
  crop: tuple[int, int] | None
  resample: str = "bicubic"

  def __call__(self, pixels: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "h w C"]:
    size = self._resized(*pixels.shape[:2])
    crop = self.crop or size
    top, left = ((whole - part) // 2 for whole, part in zip(size, crop, strict=True))
    inside = min(top, left) >= 0
    if size == pixels.shape[:2] and inside:
      return pixels[top : top + crop[0], left : left + crop[1]]
    if inside and self.resample in KERNELS:
      return resize_window(pixels, size, (top, left, *crop), self.resample)
    image = picture(pixels)
    if size != pixels.shape[:2]:
      image = image.resize(size[::-1], Image.Resampling[self.resample.upper()])
    return np.asarray(image.crop((left, top, left + crop[1], top + crop[0])))

  def _resized(self, height: int, width: int) -> tuple[int, int]:
    if self.resize is None:
      return height, width
    if not isinstance(self.resize, int):
      return self.resize
    short = self.resize
    return (int(short * height / width), short) if width <= height else (short, int(short * width / height))

  def of_size(self, height: int, width: int) -> Framing:
    """The same for images of another size: of the resized image, the crop keeps its share."""
    if self.crop is None:
      return dataclasses.replace(self, resize=height if isinstance(self.resize, int) else (height, width))
    resize = self.resize
    if isinstance(resize, int):
      resize = round(min(height, width) * resize / min(self.crop))
    elif resize is not None:
      resize = round(height * resize[0] / self.crop[0]), round(width * resize[1] / self.crop[1])
    return dataclasses.replace(self, resize=resize, crop=(height, width))

  @property
  def crop_ratio(self) -> float | None:
    """The share of the short side that a square crop has; None: it is not that of `standard`."""
    if not isinstance(self.resize, int) or self.crop is None or self.resample != "bicubic":
      return None
    return self.crop[0] / self.resize if self.crop[0] == self.crop[1] <= self.resize else None


def standard(size: int, crop_ratio: float = CROP_RATIO) -> Framing:
  """That of evaluations: the short side becomes size / crop_ratio (bicubic), then the centre."""
  return Framing(round(size / crop_ratio), (size, size))
