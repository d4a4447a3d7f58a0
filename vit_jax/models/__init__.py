"""Linen modules and their sizes."""

from vit_jax.models.convnext import ConvNeXt
from vit_jax.models.features import Draws, Features
from vit_jax.models.heads import ProjectionHead
from vit_jax.models.position_table import PositionTable
from vit_jax.models.positions import Rope
from vit_jax.models.vit import VisionTransformer
from vit_jax.models.zoo import MODELS, create_model, list_models

__all__ = [
  "MODELS",
  "ConvNeXt",
  "Draws",
  "Features",
  "PositionTable",
  "ProjectionHead",
  "Rope",
  "VisionTransformer",
  "create_model",
  "list_models",
]
