"""Images of any number of channels, to cut out of and to resize as Pillow does with those that it knows."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_MODES = {1: "L", 4: "CMYK"}  # Pillow's modes of so many equal channels, other than RGB; RGBA would weigh by the last


def image_channels(in_channels: int) -> int:
  """Channels to load for a model with `in_channels` inputs: RGB (3) also for a model of grey values."""
  return 3 if in_channels == 1 else in_channels


class Bands:
  """An image of C channels as several of Pillow's, with those of its methods that are needed here.

  Every channel comes out exactly as it would by itself; four at a time take little more time than one.
  """

  def __init__(self, parts: list[Image.Image]):
    self._parts = parts

  @property
  def size(self) -> tuple[int, int]:
    return self._parts[0].size

  @property
  def width(self) -> int:
    return self.size[0]

  @property
  def height(self) -> int:
    return self.size[1]

  def crop(self, box: tuple[int, int, int, int]) -> Bands:
    return Bands([part.crop(box) for part in self._parts])

  def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Bands:
    return Bands([part.resize(size, resample) for part in self._parts])

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    arrays = [np.asarray(part) for part in self._parts]
    return np.concatenate([x if x.ndim == 3 else x[:, :, None] for x in arrays], axis=-1)  # [H, W, C]


Picture = Image.Image | Bands


def picture(pixels: UInt8[np.ndarray, "H W C"]) -> Picture:
  """An image to cut out of and to resize; `np.asarray` gives its pixels."""
  channels = pixels.shape[2]
  if channels == 3:
    return Image.fromarray(pixels)
  height, width = pixels.shape[:2]
  fours = channels - channels % 4
  widths = [4] * (fours // 4) + [1] * (channels - fours)
  starts = np.cumsum([0, *widths]).tolist()
  return Bands(
    [
      Image.frombytes(_MODES[n], (width, height), pixels[:, :, start : start + n].tobytes())
      for start, n in zip(starts, widths, strict=False)
    ]
  )
