"""Images, batches and a stand-in for a model, shared by the tests of evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Means:
  """A "model" whose class token is the mean colour times a factor, and whose patches are the rows of the image."""

  def apply(self, variables: dict[str, Any], images: Any) -> Any:
    factor = variables["params"]["factor"]
    return _Features(images.mean(axis=(1, 2)) * factor, images.mean(axis=2) * factor)


@dataclasses.dataclass(frozen=True)
class _Features:
  cls: Any  # [B, 3]
  patches: Any  # [B, H, 3]


def coloured(num: int, *, seed: int, classes: int = 4, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
  """Noisy images [num, size, size, 3] whose colour is their class, and labels [num]."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, num).astype(np.int32)
  colours = np.random.default_rng(99).integers(40, 216, (classes, 3))
  noise = rng.integers(-40, 41, (num, size, size, 3))
  return np.clip(colours[labels][:, None, None] + noise, 0, 255).astype(np.uint8), labels


def batches(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
  """Batches of one size; the last is padded with white images of class 0 that are not valid."""
  for start in range(0, len(images), batch_size):
    part, label = images[start : start + batch_size], labels[start : start + batch_size]
    padding = batch_size - len(part)
    yield {
      "images": np.concatenate([part, np.full((padding, *images.shape[1:]), 255, np.uint8)]),
      "label": np.concatenate([label, np.zeros(padding, np.int32)]),
      "valid": np.arange(batch_size) < len(part),
    }
