"""Random fields the embedded images are made of: value noise, sums of it, and jittered cells.

Every field is float32 and is a function of coordinates `u, v` (float32, of one shape, in any unit) and of random tables
drawn from the caller's generator, so that one seed gives one field, wherever it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

TABLE = 64  # cells before a random table repeats: a power of two, and more cells than an image shows


def table(rng: np.random.Generator, *, period: int = TABLE) -> np.ndarray:
  """Uniform random numbers for a lattice of `period` x `period` cells, float32 [period, period]."""
  return rng.random((period, period), dtype=np.float32)


def lookup(values: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
  """The entry of a square random table for every integer cell (i, j), repeating beyond its edge."""
  mask = values.shape[0] - 1
  return values.ravel().take((i & mask) * (mask + 1) + (j & mask))


def value_noise(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Smooth noise in [-1, 1] with features one unit large."""
  values = 2.0 * table(rng) - 1.0
  i, j = np.floor(u), np.floor(v)
  a, b = u - i, v - j  # [S, S]  position within the cell
  a, b = a * a * (3.0 - 2.0 * a), b * b * (3.0 - 2.0 * b)
  i, j = i.astype(np.int32) & (TABLE - 1), j.astype(np.int32) & (TABLE - 1)
  i1, j1 = (i + 1) & (TABLE - 1), (j + 1) & (TABLE - 1)
  flat, i, i1 = values.ravel(), i * TABLE, i1 * TABLE
  top, bottom = flat.take(i + j), flat.take(i1 + j)
  top += b * (flat.take(i + j1) - top)
  bottom += b * (flat.take(i1 + j1) - bottom)
  return top + a * (bottom - top)


def fractal_noise(u: np.ndarray, v: np.ndarray, rng: np.random.Generator, *, octaves: int, gain: float = 0.5):
  """Value noise at `octaves` doubling frequencies, each `gain` times as strong as the one before."""
  total, amplitude, frequency = np.zeros_like(u), 1.0, 1.0
  for _ in range(octaves):
    total += amplitude * value_noise(u * frequency, v * frequency, rng)
    amplitude *= gain
    frequency *= 2.03  # not quite 2: lattice lines of the octaves must not coincide
  return total


def spectral_noise(size: int, rng: np.random.Generator, *, slope: float) -> np.ndarray:
  """Noise whose amplitude spectrum falls as 1/f**slope, as natural images' does (slope 1); mean 0, deviation 1.

  Returns:
    float32 [size, size].
  """
  fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
  radius = np.hypot(fy, fx)
  radius[0, 0] = np.inf
  white = rng.standard_normal((size, size), dtype=np.float32)
  field = np.fft.irfft2(np.fft.rfft2(white) / radius**slope, s=(size, size))
  return (field / (field.std() + 1e-12)).astype(np.float32)


def neighbours(
  u: np.ndarray, v: np.ndarray, rng: np.random.Generator, *, jitter: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
  """The nine cells around every point, each with one feature point moved off its centre by at most `jitter`/2.

  Yields:
    (du, dv, i, j): offset from the feature point to the coordinate, float32 [S, S], and the integer cell it belongs to.
  """
  jitter_u, jitter_v = jitter * (table(rng) - 0.5) + 0.5, jitter * (table(rng) - 0.5) + 0.5
  i, j = np.floor(u), np.floor(v)
  a, b = u - i, v - j
  i, j = i.astype(np.int32), j.astype(np.int32)
  for di in (-1, 0, 1):
    for dj in (-1, 0, 1):
      ni, nj = i + np.int32(di), j + np.int32(dj)
      index = (ni & (TABLE - 1)) * TABLE + (nj & (TABLE - 1))
      du = a - np.float32(di) - jitter_u.ravel().take(index)
      dv = b - np.float32(dj) - jitter_v.ravel().take(index)
      yield du, dv, ni, nj
