"""What a weight file holds, whatever wrote it: the tensors of each sub-module, and the architecture of the backbone."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from vit_jax.weights.convert import select
from vit_jax.weights.errors import WeightsError
from vit_jax.weights.families import family_of_config
from vit_jax.weights.files import INDEX, SINGLE, open_safetensors
from vit_jax.weights.hf_config import from_preprocessor
from vit_jax.weights.infer import Recognised, recognise
from vit_jax.weights.pth import open_pth

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"  # of a Hugging Face folder
HEADS = ("dino_head", "ibot_head")


class Opened(NamedTuple):
  """A weight file.

  Attributes:
    backbone: its layout and architecture.
    tensors: by sub-module, not read yet: "backbone", and of a training export "dino_head" and "ibot_head" (layout
      "dinov3").
    normalization: mean and standard deviation of the images it was trained with; None: the file does not say.
  """

  backbone: Recognised
  tensors: dict[str, Mapping[str, Any]]
  normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def open_weights(path: pathlib.Path) -> Opened:
  """Opens a `.pth` file, a safetensors file, or a Hugging Face folder.

  Raises:
    WeightsError: if it cannot be read, or holds no backbone that is known.
    FileNotFoundError: if there is nothing.
  """
  if path.suffix == ".safetensors" or path.is_dir():
    if path.is_dir() and not any((path / name).exists() for name in (SINGLE, INDEX)):
      raise WeightsError(f"{path} is no model: a folder of weights has {SINGLE} (or its sharded form) and {CONFIG}.")
    return _open_safetensors(path)
  return _from_names(open_pth(path))


def _open_safetensors(path: pathlib.Path) -> Opened:
  beside = (path if path.is_dir() else path.parent) / CONFIG
  config = json.loads(beside.read_text()) if beside.exists() else {}
  tensors = open_safetensors(path)
  if "model_type" not in config:  # none of transformers; timm's has other keys
    return _from_names(tensors)
  family, prefix = family_of_config(config), f"{config['model_type']}."
  if any(name.startswith(prefix) for name in tensors):  # a model with a task's head
    tensors = select(tensors, prefix)
  recognised = Recognised(family.layout, family.module, family.to_attributes(config), {})
  said = beside.with_name(PREPROCESSOR)
  normalization = from_preprocessor(json.loads(said.read_text()))[:2] if said.exists() else None
  return Opened(recognised, {"backbone": tensors}, normalization)


def _from_names(tensors: Mapping[str, Any]) -> Opened:
  """A backbone in a layout that tells its architecture: flat, or in a training export next to its heads."""
  if "teacher" in tensors:
    tensors = select(tensors, "teacher")
  if not any(name.startswith("backbone.") for name in tensors):
    return Opened(recognise(tensors), {"backbone": tensors})
  heads = [head for head in HEADS if any(name.startswith(f"{head}.") for name in tensors)]
  parts = {name: select(tensors, f"{name}.") for name in ("backbone", *heads)}
  return Opened(recognise(parts["backbone"]), parts)
