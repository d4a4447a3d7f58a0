"""Principal components of patch features as colours."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8

_CUT = 2.0  # per cent of the values beyond full and no intensity, at either end


def principal_components(
  features: Float[np.ndarray, "N D"], count: int = 3, keep: Bool[np.ndarray, " N"] | None = None
) -> Float[np.ndarray, "N count"]:
  """Coordinates of features along the directions in which they (those to `keep`) vary most.

  The sign of a direction is arbitrary; here its largest entry is positive, so that pictures can be compared.
  """
  features = np.asarray(features, np.float64)
  chosen = features if keep is None else features[keep]
  centred = chosen - chosen.mean(axis=0)  # [n, D]
  _, vectors = np.linalg.eigh(centred.T @ centred)  # columns, ascending eigenvalues
  directions = vectors[:, ::-1][:, :count].T  # [count, D]
  largest = np.abs(directions).argmax(axis=1)
  directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
  components = (features - chosen.mean(axis=0)) @ directions.T  # [N, count]
  return np.pad(components, ((0, 0), (0, count - components.shape[1])))


def principal_colours(
  features: Float[np.ndarray, "N D"], keep: Bool[np.ndarray, " N"] | None = None
) -> UInt8[np.ndarray, "N 3"]:
  """The first three components as red, green and blue, each stretched over the full range; black where not kept."""
  if keep is not None and keep.sum() < 2:
    return np.zeros((len(features), 3), np.uint8)
  components = principal_components(features, keep=keep)  # [N, 3]
  seen = components if keep is None else components[keep]
  low, high = np.percentile(seen, [_CUT, 100 - _CUT], axis=0)
  size = np.abs(features).max()
  flat = high - low <= 1e-6 * max(1e-12, float(size))  # a direction without variation is noise: mid-grey
  scaled = np.where(flat, 0.5, (components - low) / np.where(flat, 1.0, high - low))
  colours = (255 * scaled.clip(0, 1)).round().astype(np.uint8)
  return colours if keep is None else np.where(keep[:, None], colours, 0).astype(np.uint8)


def foreground_mask(patches: Float[np.ndarray, "B N D"], grid: tuple[int, int]) -> Bool[np.ndarray, "B N"]:
  """Splits all patches in two along their first component (Otsu's threshold); the side less at the borders is True.

  The first component of good features separates objects from their surroundings (DINOv2 section 7.5).
  """
  batch, count, width = patches.shape
  first = principal_components(patches.reshape(-1, width), count=1)[:, 0]
  above = (first > otsu(first)).reshape(batch, count)
  border = np.ones(grid, bool)
  border[1:-1, 1:-1] = False
  border = border.reshape(-1)
  return above if above[:, border].mean() <= above[:, ~border].mean() else ~above


def otsu(values: Float[np.ndarray, " N"], bins: int = 256) -> float:
  """The threshold that splits values into the two classes with the largest variance between them (Otsu 1979)."""
  histogram, edges = np.histogram(values, bins)
  middle = (edges[:-1] + edges[1:]) / 2
  below = np.cumsum(histogram)
  sums = np.cumsum(histogram * middle)
  above = below[-1] - below
  valid = (below > 0) & (above > 0)
  if not valid.any():
    return float(values.max())
  with np.errstate(divide="ignore", invalid="ignore"):
    between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
  between = np.where(valid, between, -1.0)
  best = np.flatnonzero(between == between.max())  # empty bins between two clusters are equally good: their middle
  return float(edges[1 + best[len(best) // 2]])
