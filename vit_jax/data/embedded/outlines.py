"""The ten shapes of the embedded scenes, as functions that are negative inside and grow with the distance.

Each takes coordinates x (right) and y (down), float32 arrays of one shape, and is scaled so that every shape covers the
area of the unit circle: the largest shape of a scene is then the nearest one, whatever the shapes are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def _convex(x: np.ndarray, y: np.ndarray, sides: int) -> np.ndarray:
  """A regular polygon with a corner at the top, corners at distance 1."""
  angles = 2 * np.pi * (np.arange(sides) + 0.5) / sides
  reach = np.full_like(x, -np.inf)
  for angle in angles:
    np.maximum(reach, np.float32(np.sin(angle)) * x - np.float32(np.cos(angle)) * y, out=reach)
  return reach - np.float32(np.cos(np.pi / sides))


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
  return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _circle(x, y):
  return np.hypot(x, y) - 1.0


def _ring(x, y):
  return np.abs(np.hypot(x, y) - 0.75) - 0.25


def _crescent(x, y):
  return np.maximum(np.hypot(x, y) - 1.0, 0.85 - np.hypot(x - 0.5, y))


def _heart(x, y):
  diagonal = np.float32(np.sqrt(0.5))
  corner = _box((x + y) * diagonal, (y - x) * diagonal, 0.5, 0.5)  # a square standing on its corner ...
  lobes = np.hypot(np.abs(x) - 0.5 * diagonal, y + 0.5 * diagonal) - 0.5  # ... and a disc on each upper side
  return np.minimum(corner, lobes)


def _triangle(x, y):
  return _convex(x, y, 3)


def _square(x, y):
  return _box(x, y, 1.0, 1.0)


def _pentagon(x, y):
  return _convex(x, y, 5)


def _star(x, y):
  """Five straight-edged points: one edge from a tip to a notch, mirrored into ten sectors."""
  sector = np.float32(np.pi / 5)
  angle, radius = np.arctan2(x, -y), np.hypot(x, y)
  angle = np.abs(angle - 2 * sector * np.round(angle / (2 * sector)))  # [0, sector]: 0 at a tip
  px, py = radius * np.cos(angle), radius * np.sin(angle)
  notch = 0.42 * np.cos(sector), 0.42 * np.sin(sector)
  length = np.hypot(notch[0] - 1.0, notch[1])
  return ((px - 1.0) * notch[1] - py * (notch[0] - 1.0)) / length


def _cross(x, y):
  return np.minimum(_box(x, y, 1.0, 0.34), _box(x, y, 0.34, 1.0))


def _arrow(x, y):
  head = np.maximum(np.abs(x) * 0.8 - (y + 1.0) * 0.6, y + 0.05)  # a triangle pointing up
  return np.minimum(head, _box(x, y - 0.45, 0.28, 0.55))


@dataclass(frozen=True)
class Outline:
  """One shape: `distance(x, y)` is negative inside; `extent` is the radius of the circle around it."""

  raw: Callable[[np.ndarray, np.ndarray], np.ndarray]
  scale: float
  extent: float

  def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return self.raw(x / np.float32(self.scale), y / np.float32(self.scale)) * np.float32(self.scale)


def _measured(raw: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Outline:
  """Scales a shape to the unit circle's area and measures how far it reaches."""
  step = 3.0 / 300
  axis = np.arange(-1.5, 1.5, step, dtype=np.float32) + np.float32(step / 2)
  x, y = np.meshgrid(axis, axis)
  inside = raw(x, y) < 0
  scale = float(np.sqrt(np.pi / (inside.sum() * step * step)))
  return Outline(raw, scale, extent=scale * (float(np.hypot(x, y)[inside].max()) + step))


OUTLINES: dict[str, Outline] = {
  name: _measured(raw)
  for name, raw in {
    "circle": _circle, "ring": _ring, "crescent": _crescent, "heart": _heart, "triangle": _triangle,
    "square": _square, "pentagon": _pentagon, "star": _star, "cross": _cross, "arrow": _arrow,
  }.items()
}  # fmt: skip
