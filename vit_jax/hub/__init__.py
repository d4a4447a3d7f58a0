"""Opening and saving models, whatever wrote them: runs, the DINO repositories, Hugging Face, timm, vit_jax."""

from vit_jax.hub.errors import UnknownModel
from vit_jax.hub.images import Preprocessing, foreign_preprocessor, load_images, load_preprocessing
from vit_jax.hub.opening import load_model
from vit_jax.hub.saving import save_model

__all__ = [
  "Preprocessing",
  "UnknownModel",
  "foreign_preprocessor",
  "load_images",
  "load_model",
  "load_preprocessing",
  "save_model",
]
