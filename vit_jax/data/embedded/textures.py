"""`embedded:textures`: twenty procedural textures whose class is in the pattern, not in the pixels or the colours.

An image is one texture under a random scale, rotation (20 degrees either way), perspective, pair of colours, light
and noise. The class is a scalar field that mixes the two colours, the darker one as ground. Nothing is placed at a
fixed position, so small copies of the images say nothing, and hues are random, so colours say little more than
how much of an image the pattern covers. The pattern repeats five to eight times across the image, so that a crop of a
twentieth of its area still shows it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vit_jax.data.embedded.noise import fractal_noise, lookup, neighbours, table, value_noise

VERSION = 7  # raise with every change of the pixels: cached images of other versions are then made again
OVERSAMPLING = 2
TAU = np.float32(2 * np.pi)
LUMA = np.array([0.299, 0.587, 0.114])
DARK, LIGHT = (0.05, 0.4), (0.54, 0.92)  # luminances of ground and pattern

Field = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _triangle(x: np.ndarray) -> np.ndarray:
  """A triangle wave of period 1 between -1 (at 0.5) and 1 (at 0)."""
  return 4.0 * np.abs(x - np.floor(x) - 0.5) - 1.0


def _stripes(u, v, rng):
  return np.cos(TAU * 1.2 * u)


def _waves(u, v, rng):
  return np.cos(TAU * (1.1 * u + rng.uniform(0.35, 0.5) * np.sin(TAU * 0.45 * v)))


def _zigzag(u, v, rng):
  return _triangle(1.1 * u + rng.uniform(0.4, 0.55) * _triangle(0.7 * v))


def _checker(u, v, rng):
  return _triangle(0.65 * u + 0.25) * _triangle(0.65 * v + 0.25)


def _grid(u, v, rng):
  return np.maximum(_triangle(u), _triangle(v))


def _dots(u, v, rng):
  radius = 0.75 + 0.5 * table(rng)
  field = np.full_like(u, -np.inf)
  for du, dv, i, j in neighbours(1.1 * u, 1.1 * v, rng, jitter=0.3):
    np.maximum(field, 1.0 - np.hypot(du, dv) / lookup(radius, i, j), out=field)
  return field


def _rings(u, v, rng):
  u, v = u * 0.45, v * 0.45
  du, dv = u - np.round(u), v - np.round(v)
  return np.cos(TAU * 3.0 * np.hypot(du, dv))


def _voronoi(u, v, rng):
  shade = table(rng)
  nearest, field = np.full_like(u, np.inf), np.zeros_like(u)
  for du, dv, i, j in neighbours(1.2 * u, 1.2 * v, rng, jitter=0.9):
    distance = du * du + dv * dv
    closer = distance < nearest
    np.copyto(field, lookup(shade, i, j), where=closer)
    np.copyto(nearest, distance, where=closer)
  return field - 0.05 * nearest


def _crackle(u, v, rng):
  first, second = np.full_like(u, np.inf), np.full_like(u, np.inf)
  for du, dv, _, _ in neighbours(0.85 * u, 0.85 * v, rng, jitter=0.9):
    distance = np.hypot(du, dv)
    np.minimum(second, np.maximum(first, distance), out=second)
    np.minimum(first, distance, out=first)
  return first - second


def _clouds(u, v, rng):
  return fractal_noise(u, v, rng, octaves=4, gain=0.6)


def _marble(u, v, rng):
  vein = 0.6 * u + 0.8 * fractal_noise(0.5 * u, 0.5 * v, rng, octaves=3, gain=0.6)
  return 1.0 - np.abs(np.sin(0.5 * TAU * vein)) ** np.float32(0.6)


def _wood(u, v, rng):
  bend = 0.7 * value_noise(0.5 * u, 0.12 * v, rng)
  ring = 0.8 * u + bend
  grain = value_noise(6.0 * u, 0.4 * v, rng)
  return (ring - np.floor(ring)) + 0.35 * grain


def _bricks(u, v, rng):
  v = 1.35 * v
  row = np.floor(v)
  along = 0.65 * u + 0.5 * (row.astype(np.int32) & 1)
  return np.maximum(2.0 * (_triangle(along) - 1.0), _triangle(v) - 1.0)


def _weave(u, v, rng):
  u, v = 0.65 * u, 0.65 * v
  i, j = np.floor(u), np.floor(v)
  odd = ((i + j).astype(np.int32) & 1).astype(bool)
  return _triangle(2.0 * np.where(odd, u - i, v - j) + 0.5)


def _hexagons(u, v, rng):
  u, v = 0.8 * u, 0.8 * v
  height = np.float32(np.sqrt(3.0))
  edge = np.full_like(u, np.inf)
  for shift in (0.0, 0.5):  # the two rectangular lattices whose union is the triangular one
    du = np.abs(u + shift - np.round(u + shift))
    dv = np.abs(v / height + shift - np.round(v / height + shift)) * height
    np.minimum(edge, np.maximum(du, 0.5 * du + 0.5 * height * dv), out=edge)
  return edge


def _truchet(u, v, rng):
  u, v = 0.8 * u, 0.8 * v
  i, j = np.floor(u), np.floor(v)
  a, b = u - i, v - j
  a = np.where(lookup(table(rng), i.astype(np.int32), j.astype(np.int32)) < 0.5, a, 1.0 - a)
  arcs = np.minimum(np.abs(np.hypot(a, b) - 0.5), np.abs(np.hypot(1.0 - a, 1.0 - b) - 0.5))
  return -arcs


def _bubbles(u, v, rng):
  radius = 0.25 + 0.45 * table(rng)
  field = np.full_like(u, np.inf)
  for du, dv, i, j in neighbours(0.7 * u, 0.7 * v, rng, jitter=0.8):
    np.minimum(field, np.abs(np.hypot(du, dv) - lookup(radius, i, j)), out=field)
  return -field


def _confetti(u, v, rng):
  angle = TAU * table(rng)
  cos, sin = np.cos(angle), np.sin(angle)
  field = np.full_like(u, np.inf)
  for du, dv, i, j in neighbours(u, v, rng, jitter=0.7):
    c, s = lookup(cos, i, j), lookup(sin, i, j)
    np.minimum(field, np.maximum(np.abs(c * du + s * dv) / 2.4, np.abs(c * dv - s * du)), out=field)
  return -field


def _scratches(u, v, rng):
  u, v = u - u.mean(), v - v.mean()
  reach = np.float32(np.hypot(u, v).max())
  num = int(6.5 * reach)  # a fixed density of lines whatever the scale
  angle = rng.uniform(0, np.pi, num)
  normal = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)  # [2, lines]
  offset = rng.uniform(-reach, reach, num).astype(np.float32)
  width = rng.uniform(0.6, 1.6, num).astype(np.float32)
  field = np.full(u.size, np.inf, np.float32)
  points = np.stack([u.ravel(), v.ravel()], 1)  # [S*S, 2]
  for k in range(num):
    np.minimum(field, np.abs(points @ normal[:, k] - offset[k]) / width[k], out=field)
  return -field.reshape(u.shape)


def _fur(u, v, rng):
  turn = 1.2 * value_noise(0.35 * u, 0.35 * v, rng)
  return value_noise(4.0 * (u + turn), 0.7 * v, rng) + 0.7 * value_noise(8.0 * (u + turn), 1.3 * v, rng)


FIELDS: dict[str, Field] = {
  "stripes": _stripes, "waves": _waves, "zigzag": _zigzag, "checker": _checker, "grid": _grid,
  "dots": _dots, "rings": _rings, "voronoi": _voronoi, "crackle": _crackle, "clouds": _clouds,
  "marble": _marble, "wood": _wood, "bricks": _bricks, "weave": _weave, "hexagons": _hexagons,
  "truchet": _truchet, "bubbles": _bubbles, "confetti": _confetti, "scratches": _scratches, "fur": _fur,
}  # fmt: skip
CLASS_NAMES = tuple(FIELDS)


def coordinates(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Pattern coordinates of every sample of an image under a random scale, aspect, rotation, shift and perspective.

  Returns:
    (u, v), float32 [size, size]: one unit is about a fifth to an eighth of the image.
  """
  axis = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(2 / size) - 1.0  # [-1, 1]
  x, y = axis[None, :], axis[:, None]
  tilt_x, tilt_y = rng.uniform(-0.12, 0.12, 2)
  depth = 1.0 / (1.0 + np.float32(tilt_x) * x + np.float32(tilt_y) * y)  # [size, size]
  scale = 0.5 * np.exp(rng.uniform(np.log(5.5), np.log(8.0)))
  aspect, angle = np.exp(rng.uniform(-0.12, 0.12)), rng.uniform(-0.35, 0.35)
  shift = rng.uniform(0, 64, 2)
  c, s = np.cos(angle) * scale, np.sin(angle) * scale
  u = depth * np.float32(aspect) * (np.float32(c) * x + np.float32(s) * y) + np.float32(shift[0])
  v = depth / np.float32(aspect) * (np.float32(c) * y - np.float32(s) * x) + np.float32(shift[1])
  return u, v


def palette(rng: np.random.Generator) -> np.ndarray:
  """Two random colours, one dark and one light, float32 [2, 3] in [0, 1].

  Any hue, but a range of luminances for each: what tells images apart then is the pattern, as soon as colour jitter
  has made hues useless. With luminances at will, crops of an image are matched by brightness before all else.
  """
  return np.stack([_color(rng, rng.uniform(*bounds)) for bounds in (DARK, LIGHT)]).astype(np.float32)


def _color(rng: np.random.Generator, luminance: float) -> np.ndarray:
  while True:
    color = rng.random(3)
    if abs(color @ LUMA - luminance) < 0.03:
      return color


def _pool(x: np.ndarray, factor: int) -> np.ndarray:
  """Mean over blocks of factor x factor samples."""
  size = x.shape[0] // factor
  blocks = x.reshape(size, factor, size, factor)
  return sum(blocks[:, i, :, j] for i in range(factor) for j in range(factor)) / factor**2


def render(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
  """One image of the texture `name`, uint8 [size, size, 3]."""
  u, v = coordinates(OVERSAMPLING * size, rng)
  field = FIELDS[name](u, v, rng)  # [2S, 2S]
  hardness, offset = rng.uniform(2.0, 5.0), rng.uniform(-0.3, 0.3)

  # Harden around the middle of the field before pooling: edges are antialiased as edges, not as ramps of the field.
  ordered = np.sort(field.ravel()[::7])  # every seventh sample estimates the quantiles well enough
  lowest, low, high, highest = (ordered[int(q * (ordered.size - 1))] for q in (0.02, 0.1, 0.9, 0.98))
  middle = np.float32((lowest + highest) / 2 + offset * (high - low))
  tone = _pool(np.tanh((field - middle) * np.float32(hardness / (high - low + 1e-6))), OVERSAMPLING)  # [S, S]
  mix = (0.5 + 0.5 * tone)[..., None]  # [S, S, 1]

  first, second = palette(rng)
  image = first + mix * (second - first)  # [S, S, 3]
  image *= _light(size, rng)
  image += np.float32(rng.uniform(0.0, 0.03)) * rng.standard_normal(image.shape, dtype=np.float32)
  return (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _light(size: int, rng: np.random.Generator) -> np.ndarray:
  """A smooth brightness ramp over the image in a random direction, float32 [size, size, 1]."""
  axis = np.linspace(-1.0, 1.0, size, dtype=np.float32)
  x, y = rng.uniform(-0.2, 0.2, 2).astype(np.float32)
  return (1.0 + x * axis[None, :] + y * axis[:, None])[..., None]


def label_of(split: int, index: int) -> int:
  """The class of image `index`: every run of twenty indices holds each class once, in a random order."""
  block, place = divmod(index, len(CLASS_NAMES))
  return int(np.random.default_rng([split, 1, block]).permutation(len(CLASS_NAMES))[place])


def example(split: int, index: int, *, size: int) -> tuple[np.ndarray, int]:
  """Image `index` of a split (0 train, 1 test), uint8 [size, size, 3], and its label; the same whatever the count."""
  label = label_of(split, index)
  return render(CLASS_NAMES[label], size, np.random.default_rng([split, 0, index])), label
