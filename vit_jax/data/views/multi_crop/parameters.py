"""What decides the crops of an image and the masks of a loss group: plain values, checked."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Self

NUM_GLOBAL = 2  # global crops of an image, as in all of DINO's recipes
_CANVAS_STEP = 64  # pixels: sides that matrix units like


class Resolution(NamedTuple):
  """One of several sizes of the crops, and the share of the steps that train at it."""

  global_size: int
  local_size: int
  gram_size: int  # 0: no gram crops
  probability: float


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Crops, photometric distortions and masks of a batch; the defaults are the config's.

  Triples hold the probabilities for (first global crop, second global crop, each local crop). Ranges are (low, high).

  Raises:
    ValueError: for a value out of range; the message names the config key to change.
  """

  global_size: int = 224  # side of the two global crops, pixels
  global_scale: tuple[float, float] = (0.32, 1.0)  # share of the image's area that a global crop covers
  local_size: int = 96  # side of the local crops, pixels
  local_scale: tuple[float, float] = (0.05, 0.32)  # share of the image's area that a local crop covers
  local_number: int = 8  # local crops of an image; 0: none
  local_inside_global: bool = False  # cut them out of the global crops, half of them out of each
  gram_size: int | None = None  # side of the gram crops, the global crops once more at this size; None: no gram crops
  gram_distortions: bool = False  # the gram crops are distorted as the global crops are; False: not at all
  # Several sizes of all crops, one of them for each step. (): the sizes above.
  resolutions: tuple[Resolution, ...] = ()
  stride: int = 16  # pixels between neighbouring patches
  channels: int = 3  # of the images: 3: RGB, whatever they were; other numbers: they must have so many
  # Values that become 0 and 255, of images that do not have 8 bits. None: see `decode.decode`.
  value_range: tuple[float, float] | None = None
  flip: float = 0.5  # probability of a horizontal flip
  jitter: float = 0.8  # probability of colour jitter, its four parts in random order
  brightness: float = 0.4  # factor drawn from [1 - x, 1 + x]
  contrast: float = 0.4  # factor drawn from [1 - x, 1 + x]
  saturation: float = 0.2  # factor drawn from [1 - x, 1 + x]
  hue: float = 0.1  # shift drawn from [-x, x], in turns of the colour circle
  grayscale: float = 0.2  # probability of losing all colour
  blur: tuple[float, float, float] = (0.0, 0.9, 0.5)  # probabilities of a Gaussian blur (9 x 9 taps)
  blur_sigma: tuple[float, float] = (0.1, 2.0)  # its standard deviation, pixels
  solarize: tuple[float, float, float] = (0.0, 0.2, 0.0)  # probabilities of inverting the values from 128 on
  share_color_jitter: bool = False  # jitter and grayscale once, before the image is cropped, and not for each crop
  mask_grid: tuple[int, int] | None = (14, 14)  # patches (rows, columns) of a global crop; None: no masks
  mask_probability: float = 0.5  # share of the global crops that are masked
  mask_ratio: tuple[float, float] = (0.1, 0.5)  # masked share of a masked crop: evenly spread over this range
  mask_shift: bool = False  # roll every mask by a random offset
  # Height and width of the canvas on which images are delivered as decoded, for crops to be made on the device. None:
  # crops are made on the host.
  canvas: tuple[int, int] | None = None
  # Images whose mask quota is drawn together and which no process boundary separates. None: the batch up to 64 images,
  # else its largest divisor up to 64.
  loss_group_size: int | None = None

  def __post_init__(self):
    for name in (
      "global_scale",
      "local_scale",
      "blur",
      "blur_sigma",
      "solarize",
      "mask_ratio",
      "mask_grid",
      "canvas",
      "value_range",
    ):
      if getattr(self, name) is not None:
        object.__setattr__(self, name, tuple(getattr(self, name)))  # a list (from a config or from JSON) would not hash
    object.__setattr__(self, "resolutions", tuple(Resolution(*values) for values in self.resolutions))
    self._check_geometry()
    self._check_photometric()
    if self.mask_grid is not None:
      _require(
        len(self.mask_grid) == 2 and min(self.mask_grid) >= 1, "mask_grid", self.mask_grid, "two positive integers"
      )
      _require(
        0.0 <= self.mask_probability <= 1.0, "ibot.mask_probability", self.mask_probability, "a number in [0, 1]"
      )
      low, high = self.mask_ratio
      _require(0.0 <= low <= high <= 1.0, "ibot.mask_ratio", self.mask_ratio, "low <= high, both in [0, 1]")
    if self.loss_group_size is not None:
      _require(self.loss_group_size >= 1, "loss_group_size", self.loss_group_size, "a positive integer")

  def group_size(self, batch_size: int) -> int:
    """Images of a loss group in a global batch of `batch_size` images."""
    if self.loss_group_size is not None:
      return self.loss_group_size
    return next(size for size in range(min(batch_size, 64), 0, -1) if batch_size % size == 0)

  def variants(self) -> tuple[Self, ...]:
    """The views of one step each: one for every resolution, or these themselves where there is one only."""
    if not self.resolutions:
      return (self,)
    return tuple(
      dataclasses.replace(
        self,
        global_size=size.global_size,
        local_size=size.local_size,
        gram_size=size.gram_size or None,
        mask_grid=self.mask_grid and (size.global_size // self.stride,) * 2,
        resolutions=(),
      )
      for size in self.resolutions
    )

  @property
  def shares(self) -> tuple[float, ...]:
    """The share of the steps of each of several variants, as far as they are normalised; one variant: (1.0,)."""
    return tuple(size.probability for size in self.resolutions) or (1.0,)

  @property
  def sizes(self) -> dict[str, int]:
    """Sides of the crops of one step, in pixels, by kind."""
    gram = {"gram": self.gram_size} if self.gram_size else {}
    return {"global": self.global_size, "local": self.local_size} | gram

  @property
  def name(self) -> str:
    """The sizes of the crops of one step, "global/local" or "global/local/gram"."""
    return "/".join(map(str, self.sizes.values()))

  @property
  def base_size(self) -> int:
    """The side at which the region of a global crop is cut out: the larger of global and gram crop."""
    return max(self.global_size, self.gram_size or 0)

  @property
  def enough_pixels(self) -> int:
    """The short side from which on every crop is cut with at least twice as many pixels a side as it keeps."""
    sides = [self.base_size / math.sqrt(self.global_scale[0])]
    if self.local_number and not self.local_inside_global:
      sides.append(self.local_size / math.sqrt(self.local_scale[0]))
    return math.ceil(2.0 * max(sides))

  @property
  def enough_canvas(self) -> tuple[int, int]:
    """A canvas on which no crop of an image of usual shape (4:3, either way up) has to be enlarged."""
    sides = [view.enough_pixels / 2.0 for view in self.variants()]
    side = _CANVAS_STEP * math.ceil(4.0 / 3.0 * max(sides) / _CANVAS_STEP)
    return side, side

  def _check_geometry(self):
    _require(self.channels >= 1, "model.in_channels", self.channels, "a positive number of channels")
    if self.value_range is not None:
      valid = len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]
      _require(valid, "data.value_range", self.value_range, "(low, high) with low < high")
    if self.canvas is not None:
      valid = len(self.canvas) == 2 and min(self.canvas) >= 2
      _require(valid, "data.canvas", self.canvas, "(height, width), both at least 2 pixels")
    _require(self.local_number >= 0, "crops.local_number", self.local_number, "0 or more")
    sizes = {"crops.global_size": self.global_size, "crops.local_size": self.local_size}
    for key, size in (sizes | ({} if self.gram_size is None else {"crops.gram_size": self.gram_size})).items():
      _require(size >= 1, key, size, "a positive number of pixels")
    _require(
      all(size.probability > 0 for size in self.resolutions),
      "crops.resolutions",
      self.resolutions,
      "(global, local, gram or 0, probability) with probabilities above 0",
    )
    if self.local_inside_global and not self.resolutions:
      _require(
        self.local_size <= self.global_size,
        "crops.local_size",
        self.local_size,
        f"at most {self.global_size}, the global crops, inside which the local ones lie (crops.local_inside_global)",
      )
    if self.local_inside_global:
      _require(
        self.local_number % 2 == 0,
        "crops.local_number",
        self.local_number,
        "even: half of the local crops lie inside each global crop (crops.local_inside_global)",
      )
    for key, scale in (("crops.global_scale", self.global_scale), ("crops.local_scale", self.local_scale)):
      _require(len(scale) == 2 and 0.0 < scale[0] <= scale[1] <= 1.0, key, scale, "low <= high, both in (0, 1]")

  def _check_photometric(self):
    for key, value in (
      ("crops.flip", self.flip),
      ("augment.jitter", self.jitter),
      ("augment.grayscale", self.grayscale),
    ):
      _require(0.0 <= value <= 1.0, key, value, "a probability in [0, 1]")
    for key, triple in (("augment.blur", self.blur), ("augment.solarize", self.solarize)):
      valid = len(triple) == 3 and all(0.0 <= value <= 1.0 for value in triple)
      _require(valid, key, triple, "three probabilities: (first global crop, second global crop, local crops)")
    for name in ("brightness", "contrast", "saturation"):
      _require(getattr(self, name) >= 0.0, f"augment.{name}", getattr(self, name), "0 or more")
    for name in ("saturation", "hue", "grayscale"):
      if self.channels != 3:
        _require(getattr(self, name) == 0.0, f"augment.{name}", getattr(self, name), "0 for images that are not RGB")
    _require(0.0 <= self.hue <= 0.5, "augment.hue", self.hue, "a number in [0, 0.5]")
    valid = len(self.blur_sigma) == 2 and 0.0 < self.blur_sigma[0] <= self.blur_sigma[1]
    _require(valid, "augment.blur_sigma", self.blur_sigma, "low <= high, both above 0")


def _require(valid: bool, key: str, value: object, wanted: str):
  if not valid:
    raise ValueError(f"{key} = {value!r}: it must be {wanted}.")
