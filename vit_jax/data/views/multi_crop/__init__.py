"""Global and local crops of each image, and masks on the global ones: the views of DINO, iBOT, DINOv2 and DINOv3."""

from __future__ import annotations

from vit_jax.data.views.multi_crop.views import MultiCrop

__all__ = ["MultiCrop"]
