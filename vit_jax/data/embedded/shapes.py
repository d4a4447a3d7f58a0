"""`embedded:shapes`: scenes of textured, coloured, shaded shapes with every annotation exact, still or in motion.

    scene(7)                    three shapes on coloured noise
    scene(7, t=0.5)             the same scene half a second later
    scene(7).instances          which object each pixel shows: exactly what the image was drawn from

All objects of a scene are equally large things at different distances: the nearest looks largest, is never hidden, and
its shape is the scene's label.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from vit_jax.data.embedded import photos
from vit_jax.data.embedded.noise import spectral_noise
from vit_jax.data.embedded.outlines import OUTLINES
from vit_jax.data.embedded.textures import FIELDS

VERSION = 1
SHAPES = CLASS_NAMES = tuple(OUTLINES)
BACKGROUNDS = {"noise": "noise", "photo": "a photograph"}  # name -> how captions say it

COLORS: dict[str, tuple[float, float, float]] = {
  "red": (0.85, 0.10, 0.10), "orange": (0.95, 0.50, 0.05), "yellow": (0.95, 0.90, 0.15), "green": (0.15, 0.65, 0.15),
  "cyan": (0.15, 0.85, 0.85), "blue": (0.12, 0.20, 0.90), "purple": (0.50, 0.12, 0.70), "pink": (0.95, 0.50, 0.75),
  "brown": (0.45, 0.27, 0.10), "white": (0.95, 0.95, 0.95),
}  # fmt: skip
# name -> (field of textures.py, periods per radius, level above which the darker tone shows)
TEXTURES: dict[str, tuple[str, float, float] | None] = {
  "solid": None,
  "striped": ("stripes", 1.6, 0.0),
  "checkered": ("checker", 2.4, 0.0),
  "dotted": ("dots", 1.9, 0.64),
  "cloudy": ("clouds", 1.8, 0.0),
}

OVERSAMPLING = 3  # odd: one sample lies at each pixel's centre; masks and depth are those samples
FOCAL = 0.6  # radius in the image = FOCAL / depth
MOST_OBJECTS = 20
BACKGROUND_DEPTH = 50.0  # behind every object
BULGE = 0.05  # an object's middle is nearer than its rim by this share of its depth: less than the gaps


@dataclass(frozen=True)
class Object:
  """What one object is and where it was drawn.

  Attributes:
    shape, texture, color: names, of SHAPES, TEXTURES and COLORS.
    depth: distance of its rim.
    center: (x, y) in pixels, 0 at the image's left and upper edges.
    area: visible pixels; 0 for an object that others hide altogether.
    box: (x0, y0, x1, y1), the tightest around the visible pixels, in pixels, ends exclusive; None if there are none.
  """

  shape: str
  texture: str
  color: str
  depth: float
  center: tuple[float, float]
  area: int
  box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Scene:
  """An image and the truth about it.

  Attributes:
    image: uint8 [S, S, 3].
    instances: int32 [S, S], 0 where the background shows, k + 1 where objects[k] does.
    classes: int32 [S, S], 0 for background, 1 + index into SHAPES.
    depth: float32 [S, S], distance of what each pixel shows; BACKGROUND_DEPTH for background.
    objects: nearest first.
    caption: a sentence naming every visible object.
  """

  image: np.ndarray
  instances: np.ndarray
  classes: np.ndarray
  depth: np.ndarray
  objects: tuple[Object, ...]
  caption: str

  @cached_property
  def label(self) -> int:
    """Index into SHAPES of the object with the most visible pixels."""
    return SHAPES.index(max(self.objects, key=lambda item: item.area).shape)


@dataclass(frozen=True)
class _Plan:
  """One object as drawn from the seed, before any time has passed. Lengths in shares of the image's side."""

  shape: str
  texture: str
  color: str
  tint: np.ndarray  # [3] the exact colour
  radius: float
  position: np.ndarray  # [2] x, y
  velocity: np.ndarray  # [2] per unit of time
  angle: float
  spin: float
  seed: tuple[int, ...]

  @property
  def margin(self) -> float:
    """How far its centre stays from the image's edges."""
    return min(self.radius * OUTLINES[self.shape].extent, 0.49)

  def at(self, t: float) -> np.ndarray:
    """Its centre at time t: straight motion, reflected where the object would leave the image."""
    span = 1.0 - 2.0 * self.margin
    phase = np.mod(self.position - self.margin + self.velocity * t, 2.0 * span)
    return self.margin + np.minimum(phase, 2.0 * span - phase)


def scene(
  seed: int | tuple[int, ...],
  *,
  size: int = 64,
  num_objects: int = 3,
  t: float = 0.0,
  background: str = "noise",
  shape: str | None = None,
) -> Scene:
  """Draws the scene of a seed at a time.

  Args:
    seed: decides everything but the five arguments below; a tuple counts as one seed.
    size: pixels of the image's side.
    num_objects: how many objects; later ones are farther, smaller and may be hidden.
    t: time: objects move up to a fifth of the image per unit, turn, and turn back at its edges.
    background: "noise" (coloured 1/f noise) or "photo" (needs the photos extra).
    shape: shape of the nearest object; None: random.

  Raises:
    ValueError: for an unknown background or shape, or a number of objects out of range.
    ImportError: for background="photo" without the packages that hold the photographs.
  """
  if background not in BACKGROUNDS:
    raise ValueError(f"background={background!r} is not one of {', '.join(BACKGROUNDS)}.")
  if shape is not None and shape not in SHAPES:
    raise ValueError(f"shape={shape!r} is not one of {', '.join(SHAPES)}.")
  if not 1 <= num_objects <= MOST_OBJECTS:
    raise ValueError(f"a scene holds 1 to {MOST_OBJECTS} objects, got num_objects={num_objects}.")
  seed = seed if isinstance(seed, tuple) else (seed,)
  plans, light = _plan(seed, num_objects, shape)
  canvas = _Canvas.of(_background(background, size, np.random.default_rng([*seed, 0])))
  for k in range(num_objects - 1, -1, -1):  # far to near: nearer objects paint over
    canvas.paint(plans[k], k + 1, t, light)
  return canvas.finish(plans, t, background)


def _plan(seed: tuple[int, ...], num: int, shape: str | None) -> tuple[list[_Plan], np.ndarray]:
  """The objects of a scene, nearest first, and the direction light comes from."""
  rng = np.random.default_rng([*seed, 1])
  light = np.array([*rng.uniform(-0.7, 0.7, 2), 1.0], np.float32)
  radius = rng.uniform(0.19, 0.29) * min(1.0, (3 / num) ** 0.5)
  step = min(1.25, 4.0 ** (1 / max(num - 1, 1)))  # the farthest of many is still a quarter as large as the nearest
  plans: list[_Plan] = []
  for k in range(num):
    name = SHAPES[rng.integers(len(SHAPES))]
    plan = _Plan(
      shape=shape if k == 0 and shape is not None else name,
      texture=list(TEXTURES)[rng.integers(len(TEXTURES))],
      color=(color := list(COLORS)[rng.integers(len(COLORS))]),
      tint=np.clip(np.array(COLORS[color]) + rng.uniform(-0.05, 0.05, 3), 0, 1).astype(np.float32),
      radius=radius,
      position=np.zeros(2),
      velocity=rng.uniform(0.05, 0.2) * _direction(rng),
      angle=rng.uniform(0, 2 * np.pi),
      spin=rng.uniform(-1.5, 1.5),
      seed=(*seed, 2, k),
    )
    plans.append(_placed(plan, plans, rng))
    radius /= max(1.25, step) if k == 0 else step ** rng.uniform(0.8, 1.0)
  return plans, light / np.linalg.norm(light)


def _direction(rng: np.random.Generator) -> np.ndarray:
  angle = rng.uniform(0, 2 * np.pi)
  return np.array([np.cos(angle), np.sin(angle)])


def _placed(plan: _Plan, others: list[_Plan], rng: np.random.Generator) -> _Plan:
  """The object at the place, of a dozen random ones, that nearer objects hide least."""
  places = rng.uniform(plan.margin, 1.0 - plan.margin, (12, 2))
  free = [
    min((np.hypot(*(place - other.position)) / (plan.radius + other.radius) for other in others), default=1.0)
    for place in places
  ]
  return replace(plan, position=places[int(np.argmax(np.minimum(free, 1.0)))])


def _background(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
  """float32 [size, size, 3] in [0, 1]."""
  if kind == "photo":
    return photos.crop(rng, size).astype(np.float32) / 255.0
  shared = spectral_noise(size, rng, slope=1.2)
  channels = [0.7 * shared + 0.5 * spectral_noise(size, rng, slope=1.2) for _ in range(3)]
  mean = rng.uniform(0.3, 0.7, 3).astype(np.float32)
  return np.clip(mean + np.float32(rng.uniform(0.08, 0.18)) * np.stack(channels, -1), 0.0, 1.0)


@dataclass(frozen=True)
class _Canvas:
  """The scene while it is drawn, at OVERSAMPLING samples per pixel and side."""

  image: np.ndarray  # [n, n, 3] float32
  instances: np.ndarray  # [n, n] int32
  depth: np.ndarray  # [n, n] float32
  haze: np.ndarray  # [3] the colour distance fades to

  @classmethod
  def of(cls, background: np.ndarray) -> _Canvas:
    image = background.repeat(OVERSAMPLING, 0).repeat(OVERSAMPLING, 1)
    depth = np.full(image.shape[:2], BACKGROUND_DEPTH, np.float32)
    return cls(image, np.zeros(image.shape[:2], np.int32), depth, background.mean((0, 1)))

  def paint(self, plan: _Plan, number: int, t: float, light: np.ndarray) -> None:
    """Draws one object over what is there."""
    samples = len(self.image)
    center, reach = plan.at(t), plan.radius * OUTLINES[plan.shape].extent
    first = np.clip(np.floor((center - reach) * samples) - 1, 0, samples).astype(int)
    last = np.clip(np.ceil((center + reach) * samples) + 2, 0, samples).astype(int)
    window = np.s_[first[1] : last[1], first[0] : last[0]]
    x, y = (((np.arange(first[d], last[d]) + 0.5) / samples - center[d]) / plan.radius for d in (0, 1))
    angle = plan.angle + plan.spin * t
    c, s = np.cos(angle), np.sin(angle)
    u = (c * x[None, :] + s * y[:, None]).astype(np.float32)  # [h, w]  in the object's own frame, radius 1
    v = (c * y[:, None] - s * x[None, :]).astype(np.float32)

    distance = OUTLINES[plan.shape].distance(u, v)  # [h, w]
    inside = distance < 0
    height = np.sqrt(1.0 - (1.0 - np.clip(-distance / 0.5, 0.0, 1.0)) ** 2)  # a cushion: 0 at the rim, 1 in the middle
    slope_y, slope_x = np.gradient(0.35 * height, 1.0 / (samples * plan.radius))
    facing = (light[2] - slope_x * light[0] - slope_y * light[1]) / np.sqrt(1.0 + slope_x**2 + slope_y**2)
    color = _surface(plan, u, v) * (0.35 + 0.75 * np.clip(facing, 0.0, 1.0))[..., None]
    depth = FOCAL / plan.radius
    clear = float(np.exp(-depth / 30.0))
    color = clear * color + (1.0 - clear) * self.haze  # [h, w, 3]

    np.copyto(self.image[window], color, where=inside[..., None])
    np.copyto(self.instances[window], np.int32(number), where=inside)
    np.copyto(self.depth[window], np.float32(depth) * (1.0 - np.float32(BULGE) * height), where=inside)

  def finish(self, plans: list[_Plan], t: float, background: str) -> Scene:
    """Pools the image and reads masks, boxes and depth off the pixel centres."""
    size, middle = len(self.image) // OVERSAMPLING, OVERSAMPLING // 2
    blocks = self.image.reshape(size, OVERSAMPLING, size, OVERSAMPLING, 3)
    image = sum(blocks[:, i, :, j] for i in range(OVERSAMPLING) for j in range(OVERSAMPLING)) / OVERSAMPLING**2
    instances = self.instances[middle::OVERSAMPLING, middle::OVERSAMPLING].copy()
    numbers = np.array([0] + [1 + SHAPES.index(plan.shape) for plan in plans], np.int32)
    objects = tuple(_object(plan, instances == k + 1, t) for k, plan in enumerate(plans))
    return Scene(
      image=(np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8),
      instances=instances,
      classes=numbers[instances],
      depth=self.depth[middle::OVERSAMPLING, middle::OVERSAMPLING].copy(),
      objects=objects,
      caption=_caption(objects, background),
    )


def _surface(plan: _Plan, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Colour of the object's surface before light, float32 [h, w, 3]."""
  texture = TEXTURES[plan.texture]
  if texture is None:
    return np.broadcast_to(plan.tint, (*u.shape, 3))
  name, frequency, level = texture
  field = FIELDS[name](np.float32(frequency) * u, np.float32(frequency) * v, np.random.default_rng(plan.seed))
  return np.where((field > level)[..., None], np.float32(0.4) * plan.tint, plan.tint)


def _object(plan: _Plan, mask: np.ndarray, t: float) -> Object:
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if rows.size else None
  x, y = plan.at(t) * len(mask)
  return Object(
    shape=plan.shape, texture=plan.texture, color=plan.color, depth=FOCAL / plan.radius,
    center=(float(x), float(y)), area=int(mask.sum()), box=box,
  )  # fmt: skip


def _caption(objects: tuple[Object, ...], background: str) -> str:
  """For example "a striped red star in front of a solid blue ring and a dotted pink heart, on noise"."""
  names = [f"a {item.texture} {item.color} {item.shape}" for item in objects if item.area]
  nearest, rest = names[0], names[1:]
  behind = " and ".join([", ".join(rest[:-1]), rest[-1]] if len(rest) > 1 else rest)
  return nearest + (f" in front of {behind}" if behind else "") + f", on {BACKGROUNDS[background]}"


def label_of(split: int, index: int) -> int:
  """The class of image `index`: every run of ten indices holds each class once, in a random order."""
  block, place = divmod(index, len(SHAPES))
  return int(np.random.default_rng([split, 1, block]).permutation(len(SHAPES))[place])


def example(split: int, index: int, *, size: int, objects: int, background: str) -> tuple[np.ndarray, int]:
  """Image `index` of a split, uint8 [size, size, 3], and the shape of its largest object, whatever the count."""
  drawn = scene((split, 0, index), size=size, num_objects=objects, background=background,
                shape=SHAPES[label_of(split, index)])  # fmt: skip
  return drawn.image, drawn.label
