"""Images of any size on canvases of one size, so that batches of undistorted images have a static shape."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import UInt8

_TOGETHER = 4  # channels, OpenCV's limit


def fit_into(canvas: UInt8[np.ndarray, "Hc Wc C"], image: UInt8[np.ndarray, "H W C"]) -> tuple[int, int]:
  """Copies an image into the top left corner of a canvas, shrunk with its shape kept if it is larger.

  Returns:
    Height and width that it has there; what lies outside is 0.
  """
  height, width = fitting(image.shape[:2], canvas.shape[:2])
  if (height, width) == image.shape[:2]:
    canvas[:height, :width] = image
  else:
    for first in range(0, image.shape[2], _TOGETHER):
      some = slice(first, first + _TOGETHER)
      shrunk = cv2.resize(image[:, :, some], (width, height), interpolation=cv2.INTER_AREA)
      canvas[:height, :width, some] = shrunk.reshape(height, width, -1)  # OpenCV drops a single channel
  canvas[height:] = 0
  canvas[:height, width:] = 0
  return height, width


def fitting(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
  """The size (height, width) at which an image of `size` just fits; no larger than it is."""
  scale = min(1.0, *(room / length for room, length in zip(canvas, size, strict=True)))
  height, width = (max(1, min(room, round(scale * x))) for x, room in zip(size, canvas, strict=True))
  return height, width
