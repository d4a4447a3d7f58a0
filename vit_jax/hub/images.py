"""What a model expects of its images, and images made so."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_jax import checkpoints
from vit_jax.hub.errors import UnknownModel
from vit_jax.hub.opening import open_run, opener
from vit_jax.ops.images import normalize_images
from vit_jax.weights.opening import PREPROCESSOR, read_preprocessor


class Preprocessing(NamedTuple):
  """What a model expects of its images: channel means and deviations of values in [0, 1], side in pixels.

  `value_range` is of images that do not have 8 bits, as in `data.value_range`.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  image_size: int
  value_range: tuple[float, float] | None = None


def load_preprocessing(path: str | os.PathLike, *, channels: int = 3) -> Preprocessing:
  """How images are made ready for the model at `path`: as it was trained, or says itself; else as for ImageNet.

  Raises:
    UnknownModel: if that is not for images of so many channels, which are those of the model.
  """
  found, said = _preprocessing(pathlib.Path(path).expanduser())
  if not len(found.mean) == len(found.std) == channels:
    says = f"says mean={found.mean} and std={found.std}" if said else "does not say with which mean and std"
    raise UnknownModel(
      f"{path} {says}, which does not fit the {channels} channels of the model: convert it from the run that trained "
      f"it, or put a {PREPROCESSOR} with image_mean, image_std and size beside it."
    )
  return found


def load_images(
  files: Sequence[str | os.PathLike], *, like: str | os.PathLike, size: int | None = None
) -> Float[Array, "B S S C"]:
  """Images as the model at `like` takes them: short side resized, centre cropped, normalised; float32.

  Args:
    files: images of any format that a folder of training images may have.
    like: what `load_model` opened.
    size: S, pixels a side; None: as the model says.

  Raises:
    BadImage: naming the file that cannot be read.
    UnknownModel: if there is no model at `like`.
  """
  from vit_jax.data.decode import decode
  from vit_jax.data.evaluation_batches import resize_and_crop
  from vit_jax.data.views import image_channels

  seen, _ = _preprocessing(pathlib.Path(like).expanduser())
  kind = {"channels": image_channels(len(seen.mean)), "value_range": seen.value_range}
  paths = [pathlib.Path(file).expanduser() for file in files]
  images = [resize_and_crop(decode(path, str(path), **kind), size or seen.image_size) for path in paths]
  return normalize_images(jnp.asarray(np.stack(images)), seen.mean, seen.std)


def _preprocessing(path: pathlib.Path) -> tuple[Preprocessing, bool]:
  """The preprocessing of a model, and whether it is stored with it."""
  from vit_jax import config  # heavy, as in open_run

  if opener(path) is open_run:
    workdir, step, _ = checkpoints.find(path)
    c = config.from_dict(checkpoints.read_meta(workdir, step=step)["config"])
    size = c.evaluation.image_size or c.crops.global_size
    return Preprocessing(c.augment.mean, c.augment.std, size, c.data.value_range), True
  if (stored := read_preprocessor(path)) is not None:
    return Preprocessing(*stored), True
  c = config.default()
  return Preprocessing(c.augment.mean, c.augment.std, c.crops.global_size), False


