"""One crop of each image with its label: the views of supervised training (Inception-style crops, as in the ViT paper).

A batch of B images: images uint8 [B, H, W, C], label int32 [B]. Everything is made on the host.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vit_jax.data.resampling import crop_and_resize, planes
from vit_jax.data.views.base import Arrays, Batch, Drawn, Panel, Record
from vit_jax.data.views.multi_crop.host import draw_box

if TYPE_CHECKING:
  import jax


@dataclasses.dataclass(frozen=True)
class SingleCrop:
  """A random resized crop of each image, perhaps mirrored.

  Attributes:
    size: side of the crop, pixels.
    scale: share of the image's area that it covers, (low, high).
    flip: probability of a horizontal flip.
    stride: the size is a multiple of this.
    channels: of the images; 3: RGB.
    value_range: see `decode.decode`.
    loss_group_size: images that no process boundary separates.
  """

  size: int = 224
  scale: tuple[float, float] = (0.08, 1.0)
  flip: float = 0.5
  stride: int = 16
  channels: int = 3
  value_range: tuple[float, float] | None = None
  loss_group_size: int = 1

  needs: ClassVar[tuple[str, ...]] = ("image", "label")
  shares: ClassVar[tuple[float, ...]] = (1.0,)

  def __post_init__(self) -> None:
    object.__setattr__(self, "scale", tuple(self.scale))  # a list would not hash
    if self.size % self.stride:
      raise ValueError(f"crops.global_size={self.size}: must be a multiple of {self.stride}, the pixels of a patch.")

  @property
  def decoding(self) -> dict[str, Any]:
    return {"channels": self.channels, "value_range": self.value_range}

  @property
  def name(self) -> str:
    return str(self.size)

  @property
  def sizes(self) -> dict[str, int]:
    return {"image": self.size}

  def group_size(self, batch_size: int) -> int:
    return self.loss_group_size

  def variants(self) -> tuple[SingleCrop, ...]:
    return (self,)

  def made_on(self, where: str, canvas: tuple[int, int] | None = None) -> SingleCrop:
    return self

  def facts(self) -> dict[str, str]:
    return {"crops": f"one of {self.size} pixels", "augmentation": "on the host"}

  def arrays(self, images: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    shape = (images, self.size, self.size, self.channels)
    return {"images": (shape, np.dtype(np.uint8)), "label": ((images,), np.dtype(np.int32))}

  def example(self, record: Record, rng: np.random.Generator) -> Arrays:
    image = record["image"]  # [H, W, C]
    box, flip = self._draw(rng, image)
    pixels = crop_and_resize(planes(image), *box, self.size)  # [size, size, C]
    return {"images": pixels[:, ::-1] if flip else pixels, "label": np.int32(record["label"])}

  def group(self, rng: np.random.Generator, images: int) -> Arrays:
    return {}

  def on_device(self, batch: Batch, mesh: jax.sharding.Mesh | None = None, axes: Any = None) -> dict[str, jax.Array]:
    return dict(batch)

  def panels(self, batch: Batch) -> list[Panel]:
    return [Panel("image", batch["images"][:, None])]

  def drawn(self, record: Record, rng: np.random.Generator) -> Drawn:
    image = record["image"]  # [H, W, C]
    (top, left, height, width), flip = self._draw(rng, image)
    lines = [f"{width} x {height} at ({left}, {top})"] + ["flipped"] * flip
    return Drawn(image.shape[:2], [], [lines])

  def _draw(self, rng: np.random.Generator, image: np.ndarray) -> tuple[tuple[int, int, int, int], bool]:
    """(top, left, height, width) and whether it is mirrored."""
    box = draw_box(rng, *image.shape[:2], self.scale)
    return box, bool(rng.random() < self.flip)
