"""The contract of views: what a method asks of the data, and all that the data pipeline knows of a method.

A method makes one from its config. It is a frozen, hashable, picklable value, so that it travels to worker processes
and says the same thing everywhere. The host's half of an image is `example`, what the images of a loss group share is
`group`, and what the devices still have to do is `on_device`, a part of the training step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
  import jax

Record = Mapping[str, Any]  # {"image": uint8 [H, W, C], "label": int, …}: what a source gives, its image decoded
Arrays = dict[str, np.ndarray]
Batch = Mapping[str, Any]


class Panel(NamedTuple):
  """Some of the images of a batch, as a person would look at them.

  Attributes:
    name: of each of the K, for people.
    images: uint8 (or normalised floats) [B, K, H, W, C].
    masks: patches that the model does not see, bool [B, K, N], or None.
    stacked: whether the K belong above each other, as small crops do.
  """

  name: str
  images: Any
  masks: Any = None
  stacked: bool = False


class Drawn(NamedTuple):
  """What was drawn for one image, in words.

  Attributes:
    size: height and width of the image from which the crops are cut.
    shared: what holds for all its crops.
    captions: for each picture of the panels, in their order, one thing a line.
  """

  size: tuple[int, int]
  shared: list[str]
  captions: list[list[str]]


class Views(Protocol):
  """What a method asks of the data. One of several resolutions is one of its `variants`.

  Attributes:
    needs: fields that every record must have.
    channels: of the images; 3: RGB, which every image becomes.
    decoding: how the images are decoded: options of `data.decode.decode`.
    stride: sides of the images are multiples of this.
    name: of a variant, for people: the sizes of its images.
    sizes: of a variant: sides in pixels by kind.
    shares: of the steps, of each variant, as far as they are normalised.
  """

  needs: tuple[str, ...]
  channels: int
  decoding: Mapping[str, Any]
  stride: int
  name: str
  sizes: Mapping[str, int]
  shares: tuple[float, ...]

  def group_size(self, batch_size: int) -> int:
    """Images of a loss group, whose random draws belong together, in a batch of `batch_size` images."""

  def variants(self) -> tuple[Views, ...]:
    """The views of one step each: one for every resolution, or these themselves where there is one only."""

  def made_on(self, where: str, canvas: tuple[int, int] | None = None) -> Views:
    """The same views, made on the "host" or as far as possible on the "device", from images on such a canvas."""

  def facts(self) -> dict[str, str]:
    """What is made, and where, for people: a name and its value each."""

  def arrays(self, images: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every array of a batch of a variant, as the host delivers it."""

  def example(self, record: Record, rng: np.random.Generator) -> Arrays:
    """The host's part of one record: its row of those arrays that have a row for every image."""

  def group(self, rng: np.random.Generator, images: int) -> Arrays:
    """What a loss group shares, such as masks; arrays that are concatenated along their leading axis."""

  def on_device(self, batch: Batch, mesh: jax.sharding.Mesh | None = None, axes: Any = None) -> dict[str, jax.Array]:
    """The device's part of a variant, within the training step: the batch as the method takes it.

    Args:
      batch: as `arrays` describes it.
      mesh: over which the leading axis is spread; None: one device.
      axes: of the mesh, over which it is spread.
    """

  def panels(self, batch: Batch) -> list[Panel]:
    """What is worth looking at in a batch that `on_device` made."""

  def drawn(self, record: Record, rng: np.random.Generator) -> Drawn:
    """What `example` makes of the same record and generator, in words."""


def on_one_device(views: Views) -> Callable[[Batch], dict[str, Any]]:
  """The device's part compiled for one device: for pictures and for looking at a batch of a variant."""
  import jax

  return jax.jit(functools.partial(views.on_device))
