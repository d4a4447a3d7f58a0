"""`synthetic:kind`: images made on the spot, of any size and number, to measure and rehearse without data.

    synthetic:noise?size=500x375&count=100000&format=jpeg&classes=10
    synthetic:photo?size=64&channels=13&dtype=uint16

`noise` is independent in every pixel: JPEG of it is large and slow to decode. `gradient` changes smoothly in a random
direction between two random colours: JPEG of it is small and fast. `photo`, smooth with some noise over it, has about
the size and the decoding time of a photograph. Image i is the same whatever the count and the process that makes it. A
few images are encoded and used again and again, so that what is measured is reading and decoding, not this file.
"""

from __future__ import annotations

import functools
import io
import re

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vit_jax.data.bands import picture
from vit_jax.data.sources import split_options

KINDS = ("noise", "gradient", "photo")
FORMATS = ("jpeg", "png", "webp", "none")
_FULL = {"uint8": 1, "uint16": 257, "float32": 1 / 255}  # types of arrays: by what a level of 8 bits is multiplied
_DEFAULTS = {"size": "500x375", "count": "10000", "format": "jpeg", "classes": "0", "distinct": "64",
             "channels": "3", "dtype": "uint8"}  # fmt: skip
_QUALITY = 90


class SyntheticSource:
  """Image i is number i % distinct of a few; its label is i % classes."""

  def __init__(
    self,
    kind: str,
    width: int,
    height: int,
    count: int,
    format: str,
    classes: int,
    distinct: int,
    channels: int = 3,
    dtype: str = "uint8",
  ):
    self._arguments = (kind, width, height, count, format, classes, distinct, channels, dtype)
    self._count = count
    self._distinct = distinct
    self.num_classes = classes
    self.class_names = tuple(f"class {i}" for i in range(classes))

  def __reduce__(self):
    return (SyntheticSource, self._arguments)

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, bytes | np.ndarray | int]:
    if not 0 <= index < self._count:
      raise IndexError(index)
    kind, width, height, _, format, classes, _, channels, dtype = self._arguments
    image = _image(kind, width, height, format, index % self._distinct, channels, dtype)
    return {"image": image, "label": index % classes if classes else -1}

  def describe(self, index: int) -> str:
    kind, width, height, *_ = self._arguments
    return f"synthetic {kind} of {width} x {height} pixels, number {index}"


def open_synthetic(rest: str, spec: str) -> SyntheticSource:
  """Opens `kind[?size=WIDTHxHEIGHT&count=N&format=jpeg|png|webp|none&classes=N&distinct=N&channels=N&dtype=TYPE]`.

  Args:
    rest: what stands behind "synthetic:". size: in pixels, one number for a square. format: how the images are encoded;
      none: they are arrays. classes: of the labels; 0: no labels. distinct: different images. channels,
      dtype (uint8, uint16, float32): of arrays; images of other channels than 3 or another type are arrays always.

  Raises:
    ValueError: for a kind, option or value that does not exist; it lists those that do.
  """
  kind, given = split_options(rest)
  if kind not in KINDS:
    raise ValueError(f"data.source = {spec!r}: there is no kind {kind!r}; the kinds are {', '.join(KINDS)}.")
  if unknown := sorted(set(given) - set(_DEFAULTS)):
    raise ValueError(f"data.source = {spec!r}: unknown option {', '.join(unknown)}; valid: {', '.join(_DEFAULTS)}.")
  options = {**_DEFAULTS, **given}
  size = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", options["size"])
  if not size:
    raise ValueError(
      f"data.source = {spec!r}: size={options['size']} must be WIDTHxHEIGHT, such as 500x375, or one side."
    )
  if options["format"] not in FORMATS:
    raise ValueError(f"data.source = {spec!r}: format={options['format']} is not one of {', '.join(FORMATS)}.")
  numbers = []
  for key, least in (("count", 1), ("classes", 0), ("distinct", 1), ("channels", 1)):
    if not options[key].isdecimal() or int(options[key]) < least:
      raise ValueError(f"data.source = {spec!r}: {key}={options[key]} must be a whole number, at least {least}.")
    numbers.append(int(options[key]))
  count, classes, distinct, channels = numbers
  if options["dtype"] not in _FULL:
    raise ValueError(f"data.source = {spec!r}: dtype={options['dtype']} is not one of {', '.join(_FULL)}.")
  arrays = channels != 3 or options["dtype"] != "uint8"
  if arrays and given.get("format", "none") != "none":
    raise ValueError(
      f"data.source = {spec!r}: format={given['format']} is for images of 3 channels and 8 bits; others are arrays."
    )
  width, height, format = int(size[1]), int(size[2] or size[1]), "none" if arrays else options["format"]
  distinct = min(distinct, count)
  return SyntheticSource(kind, width, height, count, format, classes, distinct, channels, options["dtype"])


@functools.lru_cache(maxsize=256)
def _image(
  kind: str, width: int, height: int, format: str, number: int, channels: int = 3, dtype: str = "uint8"
) -> bytes | np.ndarray:
  pixels = _pixels(kind, width, height, number, channels)
  if dtype != "uint8":
    pixels = (pixels * np.dtype(dtype).type(_FULL[dtype])).astype(dtype)
  if format == "none":
    pixels.setflags(write=False)  # it is handed out again
    return pixels
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format.upper(), **({} if format == "png" else {"quality": _QUALITY}))
  return file.getvalue()


def _pixels(kind: str, width: int, height: int, number: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
  rng = np.random.Generator(np.random.Philox(key=(KINDS.index(kind), number)))
  if kind == "noise":
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
  if kind == "photo":
    coarse = rng.integers(0, 256, (max(2, height // 32), max(2, width // 32), channels), dtype=np.uint8)
    smooth = np.asarray(picture(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return np.clip(smooth + rng.normal(0.0, 6.0, smooth.shape), 0, 255).astype(np.uint8)
  angle, colours = rng.random() * 2 * np.pi, rng.integers(0, 256, (2, channels))
  ramp = np.cos(angle) * np.linspace(-1, 1, width)[None] + np.sin(angle) * np.linspace(-1, 1, height)[:, None]  # [H, W]
  share = ((ramp - ramp.min()) / max(np.ptp(ramp), 1e-9))[..., None]
  return (colours[0] + share * (colours[1] - colours[0])).round().astype(np.uint8)
