"""The views of DINO, iBOT, DINOv2 and DINOv3: `Parameters` that fulfil the contract of `views.base`.

A batch of B images:

    global_crops  uint8 [B, 2, H, W, C]
    local_crops   uint8 [B, L, h, w, C]
    gram_crops    uint8 [B, 2, Hg, Wg, C]   with `gram_size`
    label         int32 [B]                 -1: none
    masks         bool [B, 2, N]            with a `mask_grid`
    mask_indices  int32 [groups, M]         where the masked patches of a loss group are: image, crop, patch
    mask_weights  float32 [groups, M]       1 / masked patches of the crop

With a canvas the host delivers in place of the crops what `device.py` makes them from:

    canvas        uint8 [B, Hc, Wc, C]      the image in the top left corner
    valid         int32 [B, 2]              its height and width
    random        float32 [B, R, U]         the numbers from which everything is drawn
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from vit_jax.data.canvas import fit_into, fitting
from vit_jax.data.views.base import Arrays, Batch, Drawn, Panel, Record
from vit_jax.data.views.multi_crop import captions, host
from vit_jax.data.views.multi_crop.masks import group_masks, indices_and_weights, masked_patches
from vit_jax.data.views.multi_crop.parameters import NUM_GLOBAL, Parameters

if TYPE_CHECKING:
  import jax

_CROPS = ("global_crops", "local_crops", "gram_crops")
_RAW = ("canvas", "valid", "random")


@dataclasses.dataclass(frozen=True)
class MultiCrop(Parameters):
  """Crops and masks of a batch; see the top of this file for its arrays, and `Parameters` for the attributes."""

  needs: ClassVar[tuple[str, ...]] = ("image",)

  @property
  def decoding(self) -> dict[str, Any]:
    return {
      "enough": self.enough_pixels,
      "fits": self.canvas,
      "channels": self.channels,
      "value_range": self.value_range,
    }

  def made_on(self, where: str, canvas: tuple[int, int] | None = None) -> Self:
    """The same crops, made on the "host", or on the "device" from images on a canvas of this height and width."""
    return dataclasses.replace(self, canvas=None if where == "host" else canvas or self.enough_canvas)

  def facts(self) -> dict[str, str]:
    """The sizes of the crops with their shares, and where they are made."""
    variants, total = self.variants(), sum(self.shares)
    names = [f"{variant.name} pixels" for variant in variants]
    if len(variants) > 1:
      names = [f"{name} ({share / total:.1%})" for name, share in zip(names, self.shares, strict=True)]
    where = "on the host"
    if self.canvas is not None:
      where = f"on the device, from canvases of {' x '.join(map(str, self.canvas))} pixels"
    return {"crops": f"{'/'.join(variants[0].sizes)} of {', '.join(names)}", "augmentation": where}

  def arrays(self, images: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    shapes = self._crops(images) if self.canvas is None else self._raw(images)
    shapes["label"] = (images,), np.int32
    if self.mask_grid is not None:
      size = self.group_size(images)
      masked = masked_patches(size, self.mask_grid, self.mask_probability, self.mask_ratio)
      shapes |= {
        "masks": ((images, NUM_GLOBAL, self.mask_grid[0] * self.mask_grid[1]), np.bool_),
        "mask_indices": ((images // size, masked), np.int32),
        "mask_weights": ((images // size, masked), np.float32),
      }
    return {name: (shape, np.dtype(kind)) for name, (shape, kind) in shapes.items()}

  def example(self, record: Record, rng: np.random.Generator) -> Arrays:
    image = record["image"]  # [H, W, C]
    label = {"label": np.int32(record["label"])}
    if self.canvas is None:
      crops = {name: np.empty(shape[1:], kind) for name, (shape, kind) in self._crops(1).items()}
      host.multi_crop(image, rng, self, **crops)
      return crops | label
    canvas = np.empty((*self.canvas, self.channels), np.uint8)
    valid = np.array(fit_into(canvas, image), np.int32)
    return {"canvas": canvas, "valid": valid, "random": host.random_numbers(rng, self)} | label

  def group(self, rng: np.random.Generator, images: int) -> Arrays:
    if self.mask_grid is None:
      return {}
    masks = group_masks(
      rng, images, self.mask_grid, self.mask_probability, self.mask_ratio, shift=self.mask_shift
    )  # [images, 2, N]
    indices, weights = indices_and_weights(masks)
    return {"masks": masks, "mask_indices": indices[None], "mask_weights": weights[None]}

  def on_device(self, batch: Batch, mesh: jax.sharding.Mesh | None = None, axes: Any = None) -> dict[str, jax.Array]:
    if "canvas" not in batch:
      return dict(batch)
    from vit_jax.data.views.multi_crop.device import augmented  # the host's workers do without jax

    made = augmented(*(batch[name] for name in _RAW), self, mesh, axes)
    return {name: array for name, array in batch.items() if name not in _RAW} | made

  def panels(self, batch: Batch) -> list[Panel]:
    panels = [Panel("global", batch["global_crops"], masks=batch.get("masks"))]
    if "gram_crops" in batch:
      panels.append(Panel("gram", batch["gram_crops"]))
    if batch["local_crops"].shape[1]:
      panels.append(Panel("local", batch["local_crops"], stacked=True))
    return panels

  def drawn(self, record: Record, rng: np.random.Generator) -> Drawn:
    image = record["image"]  # [H, W, C]
    size = image.shape[:2] if self.canvas is None else fitting(image.shape[:2], self.canvas)
    crops = host.draw_crops(rng, *size, self)
    shared = captions.colour_caption(host.draw_colours(rng, self)) if self.share_color_jitter else []
    lines = [captions.crop_caption(crop, *size) for crop in crops]
    gram = [[] for _ in range(NUM_GLOBAL)] if self.gram_size is not None else []
    return Drawn(size, shared, lines[:NUM_GLOBAL] + gram + lines[NUM_GLOBAL:])

  def _crops(self, images: int) -> dict[str, tuple[tuple[int, ...], type]]:
    shapes = {
      "global_crops": ((images, NUM_GLOBAL, self.global_size, self.global_size, self.channels), np.uint8),
      "local_crops": ((images, self.local_number, self.local_size, self.local_size, self.channels), np.uint8),
    }
    if self.gram_size is not None:
      shapes["gram_crops"] = ((images, NUM_GLOBAL, self.gram_size, self.gram_size, self.channels), np.uint8)
    return shapes

  def _raw(self, images: int) -> dict[str, tuple[tuple[int, ...], type]]:
    return {
      "canvas": ((images, *self.canvas, self.channels), np.uint8),
      "valid": ((images, 2), np.int32),
      "random": ((images, *host.random_shape(self)), np.float32),
    }
