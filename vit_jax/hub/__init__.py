"""Opening and saving models, whatever wrote them: runs, the DINO repositories, Hugging Face, timm, vit_jax."""

from vit_jax.hub.elsewhere import how_to_load
from vit_jax.hub.errors import UnknownModel
from vit_jax.hub.images import Preprocessing, kept_preprocessor, load_images, load_preprocessing
from vit_jax.hub.opening import load_model
from vit_jax.hub.saving import check_place, save_model

__all__ = [
  "Preprocessing",
  "UnknownModel",
  "check_place",
  "how_to_load",
  "kept_preprocessor",
  "load_images",
  "load_model",
  "load_preprocessing",
  "save_model",
]
