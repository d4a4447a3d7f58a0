"""What a training method asks of the data: the arrays of a batch, and who makes them."""

from __future__ import annotations

from vit_jax.data.views.base import Drawn, Panel, Views, on_one_device
from vit_jax.data.views.multi_crop import MultiCrop
from vit_jax.data.views.single_crop import SingleCrop

__all__ = ["Drawn", "MultiCrop", "Panel", "SingleCrop", "Views", "on_one_device"]
