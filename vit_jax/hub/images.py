"""What a model expects of its images, and images made so."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image, ImageOps

from vit_jax import checkpoints
from vit_jax.hub.errors import UnknownModel
from vit_jax.hub.opening import locate, open_run, opener
from vit_jax.ops.images import normalize_images
from vit_jax.weights.opening import PREPROCESSOR, read_preprocessor, split_address, stored_preprocessor
from vit_jax.weights.preprocessor import Frame, to_preprocessor

_log = logging.getLogger(__name__)

AnyImage = str | os.PathLike | bytes | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What a model expects of its images.

  Attributes:
    mean, std: of the channels, of values in [0, 1].
    image_size: side in pixels.
    value_range: of images that do not have 8 bits, as in `data.value_range`.
    framing: how an image of any shape comes to that size; None: not said, and done as evaluations do it.
    problem: what is said of it and cannot be followed; "": nothing.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  image_size: int
  value_range: tuple[float, float] | None = None
  framing: Any = None
  problem: str = ""

  @property
  def crop_ratio(self) -> float | None:
    """Side of the centre crop over the short side of the resized image; None: not said, or done in another way."""
    return None if self.framing is None else self.framing.crop_ratio


def load_preprocessing(path: str | os.PathLike, *, channels: int = 3) -> Preprocessing:
  """How images are made ready for the model at `path`: as it was trained, or says itself; else as for ImageNet.

  Raises:
    UnknownModel: if that is not for images of so many channels, which are those of the model.
  """
  found, said = _preprocessing(locate(path))
  if not len(found.mean) == len(found.std) == channels:
    says = f"says mean={found.mean} and std={found.std}" if said else "does not say with which mean and std"
    raise UnknownModel(
      f"{path} {says}, which does not fit the {channels} channels of the model: convert it from the run that trained "
      f"it, or put a {PREPROCESSOR} with image_mean, image_std and size beside it."
    )
  return found


def kept_preprocessor(path: str | os.PathLike, seen: Preprocessing) -> dict[str, Any] | None:
  """The preprocessor_config.json with which a conversion keeps what the model at `path` says of its images.

  As it is, where it has one; else made of what it says in another way (a run, timm); None: it says nothing.
  """
  path = locate(path)
  if opener(path) is not open_run and (stored := stored_preprocessor(path)) is not None:
    return stored
  if seen.problem:
    _log.warning("%s says of its images %s, which a %s cannot express: left out.", path, seen.problem, PREPROCESSOR)
  if seen.framing is None:
    return None
  return to_preprocessor(seen.mean, seen.std, Frame(*dataclasses.astuple(seen.framing)), seen.value_range)


def load_images(
  files: AnyImage | Sequence[AnyImage], *, like: str | os.PathLike, size: int | tuple[int, int] | None = None
) -> Float[Array, "B h w C"]:
  """Images as the model at `like` takes them: resized and cropped as it was evaluated, normalised; float32.

  The same as `transformers.AutoImageProcessor` makes of an export, to a level of 255.

  Args:
    files: images of any format that a folder of training images may have, by path or as bytes; or Pillow's images, or
      arrays as `vit_jax.data.decode` takes them: uint8, or floats of 0 to 1. A single one is a batch of one.
    like: what `load_model` opened.
    size: pixels a side, or (height, width); None: as the model says.

  Raises:
    ValueError: if there is no image, or an array holds other values.
    BadImage: naming the file that cannot be read.
    UnknownModel: if there is no model at `like`, or what it says of its images cannot be followed.
  """
  from vit_jax.data.bands import image_channels
  from vit_jax.data.evaluation_batches import framed

  images = _listed(files)
  model = locate(like)
  if opener(model) is None and not split_address(model)[0].exists():
    raise UnknownModel(f"like={str(like)!r}: there is no model of this name.")
  seen, _ = _preprocessing(model)
  if seen.problem:
    raise UnknownModel(
      f"{like} makes its images in a way that load_images cannot follow: {seen.problem}. Make them with "
      "transformers.AutoImageProcessor, [B, C, H, W], and bring the channels to the end: images.transpose(0, 2, 3, 1)."
    )
  height, width = _sides(size, seen.image_size)
  if seen.framing is not None:
    frame = seen.framing if size is None else seen.framing.of_size(height, width)
  elif height != width:
    raise ValueError(f"size={size}: {like} does not say how its images come to a size, and square ones are meant.")
  else:
    frame = framed(height)
  kind = {"channels": image_channels(len(seen.mean)), "value_range": seen.value_range}
  made = [frame(_pixels(image, number, kind)) for number, image in enumerate(images)]
  if len({image.shape for image in made}) > 1:
    shapes = ", ".join(dict.fromkeys(f"{image.shape[0]}x{image.shape[1]}" for image in made))
    raise ValueError(f"{like} resizes the short side alone, which gives images of {shapes}: load them one by one.")
  return normalize_images(jnp.asarray(np.stack(made)), seen.mean, seen.std)


def _listed(files: Any) -> list[Any]:
  """The images one by one."""
  one = isinstance(files, str | os.PathLike | bytes | Image.Image) or hasattr(files, "read")
  if not one and hasattr(files, "ndim"):  # an array: one image, or a batch of them
    files = np.asarray(files)
    one = files.ndim < 4
  if one:
    return [files]
  try:
    images = list(files)
  except TypeError:
    raise ValueError(f"load_images takes paths, images of Pillow or arrays, not {type(files).__name__}.") from None
  if not images:
    raise ValueError("load_images was given no image: the list is empty.")
  return images


def _sides(size: Any, default: int) -> tuple[int, int]:
  size = default if size is None else size
  sides = tuple(size) if isinstance(size, Sequence | np.ndarray) else (size, size)
  if len(sides) != 2 or not all(isinstance(side, int | np.integer) and side > 0 for side in sides):
    raise ValueError(f"size={size!r}: must be pixels a side, or (height, width).")
  return sides


def _pixels(image: Any, number: int, kind: dict[str, Any]) -> np.ndarray:
  """The pixels [H, W, C] of one image, uint8."""
  from vit_jax.data.decode import BadImage, decode

  name = f"image {number} of the list"
  image = image.read() if hasattr(image, "read") else image  # an opened file
  if isinstance(image, bytes):
    return decode(image, name, **kind)
  if isinstance(image, Image.Image):
    return decode(_array(image, name), name, **kind)
  if hasattr(image, "ndim"):
    array = np.asarray(image)
    if kind["value_range"] is None and np.issubdtype(array.dtype, np.floating) and array.size:
      low, high = float(array.min()), float(array.max())
      if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"{name} is {array.dtype} from {low:.4g} to {high:.4g}: give uint8, or floats of 0 to 1.")
    return decode(array, name, **kind)
  if not isinstance(image, str | os.PathLike):
    raise ValueError(f"{name} is a {type(image).__name__}: give a path, an image of Pillow or an array.")
  path = pathlib.Path(image).expanduser()
  if path.is_dir():
    raise BadImage(str(path), "is a folder: give the files in it")
  return decode(path, str(path), **kind)


def _array(image: Image.Image, name: str) -> np.ndarray:
  """The values of an opened image, upright: [H, W], or [H, W, C] with alpha where it has it."""
  from vit_jax.data.decode import BadImage

  try:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("PA", "RGBa", "La") or "transparency" in image.info:
      image = image.convert("RGBA")
    elif image.mode in ("P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
      image = image.convert("RGB")
    return np.asarray(image)
  except Exception as error:  # a file that Pillow only reads now
    raise BadImage(name, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _preprocessing(path: pathlib.Path) -> tuple[Preprocessing, bool]:
  """The preprocessing of a model, and whether it is stored with it."""
  from vit_jax import config  # heavy, as in open_run
  from vit_jax.data.framing import Framing, standard

  if opener(path) is open_run:
    workdir, step, _ = checkpoints.find(path)
    c = config.from_dict(checkpoints.read_meta(workdir, step=step)["config"])
    size, ratio = c.evaluation.image_size or c.crops.global_size, c.evaluation.crop_ratio
    framing = None if ratio is None else standard(size, ratio)
    return Preprocessing(c.augment.mean, c.augment.std, size, c.data.value_range, framing), True
  if (stored := read_preprocessor(path)) is not None:
    *plain, frame, problem = stored
    return Preprocessing(*plain, None if frame is None else Framing(*frame), problem), True
  c = config.default()
  return Preprocessing(c.augment.mean, c.augment.std, c.crops.global_size), False
