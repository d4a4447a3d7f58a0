"""All colours, and what Pillow makes of them as their hue is turned."""

from __future__ import annotations

import numpy as np
from PIL import Image


def every_colour(step: int) -> np.ndarray:
  """Every `step`-th level of each channel against every other: uint8 [n, n^2, 3]."""
  levels = np.arange(0, 256, step, dtype=np.uint8)
  return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)


def turned_by_pillow(pixels: np.ndarray, shift: float) -> np.ndarray:
  """By its own way to hue, saturation and value of 8 bits, and back."""
  hsv = np.array(Image.fromarray(pixels).convert("HSV"))
  hsv[:, :, 0] += np.uint8(int(shift * 255) % 256)
  return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
