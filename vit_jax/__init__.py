"""vit_jax: Vision Transformers in JAX, above all DINOv3 self-supervised pretraining.

    model = vit_jax.create_model("dinov3_vits16")
    model, params = vit_jax.load_model("runs/mine")
    images = vit_jax.load_images(["cat.jpg"], like="runs/mine")
    features = model.apply({"params": params}, images)

The names below are imported when they are first used, so that `import vit_jax` (and `vit-jax --help`) is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from vit_jax import checkpoints, config, data, evaluation, losses, methods, models, weights
  from vit_jax.hub import load_images, load_model, save_model
  from vit_jax.models import create_model, list_models

__version__ = "0.1.0"

_FUNCTIONS = {name: "vit_jax.models" for name in ("create_model", "list_models")}
_FUNCTIONS |= {name: "vit_jax.hub" for name in ("load_images", "load_model", "save_model")}
_ROOMS = ("checkpoints", "config", "data", "evaluation", "losses", "methods", "models", "weights")

__all__ = [
  "checkpoints",
  "config",
  "create_model",
  "data",
  "evaluation",
  "list_models",
  "load_images",
  "load_model",
  "losses",
  "methods",
  "models",
  "save_model",
  "weights",
]


def __getattr__(name: str) -> Any:
  if name in _FUNCTIONS:
    value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
  elif name in _ROOMS:
    value = importlib.import_module(f"vit_jax.{name}")
  else:
    raise AttributeError(f"module 'vit_jax' has no attribute {name!r}; it has {', '.join(__all__)}.")
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
