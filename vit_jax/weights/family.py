"""What connects a family of Hugging Face models with ours, and how models are compared with what a family can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from vit_jax.models import PositionTable, VisionTransformer
from vit_jax.weights.errors import WeightsError


class Family(NamedTuple):
  """The models of one `model_type`.

  Attributes:
    layout: the tensor names of its files.
    module: our class.
    to_attributes: from a config.json to the attributes of our class.
    to_config: from a model and its nominal image size to a config.json.
    masking: whether its files have a mask token; None: both.
    resizing: how it resizes the positions of a model, as attributes of a `PositionTable`; None: it has none.
  """

  layout: str
  module: type[nn.Module]
  to_attributes: Callable[[Mapping[str, Any]], dict[str, Any]]
  to_config: Callable[[Any, int], dict[str, Any]]
  masking: bool | None = None
  resizing: Callable[[Any], dict[str, Any]] | None = None


# What the Vision Transformers of Hugging Face say with the same value under another name: ours: theirs.
SAME = {
  "in_channels": "num_channels",
  "patch_size": "patch_size",
  "width": "hidden_size",
  "depth": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "norm_eps": "layer_norm_eps",
}

# What the plain Vision Transformers of Hugging Face have in common.
PLAIN = dict(
  class_token=True,
  patch_bias=True,
  qk_norm=False,
  pre_norm=False,
  norm="layernorm",
  separate_cls_norm=False,
  separate_local_cls_norm=False,
  pool="cls",
  pool_norm=False,
)


def make_config(
  model: nn.Module, model_type: str, architecture: str, same: Mapping[str, str], **specific: Any
) -> dict[str, Any]:
  """A config.json: the attributes of `same` (ours: theirs), and what is specific to the family."""
  named = {theirs: getattr(model, ours) for ours, theirs in same.items()}
  return dict(architectures=[architecture], model_type=model_type, dtype="float32") | named | specific


def same_attributes(config: Mapping[str, Any], same: Mapping[str, str]) -> dict[str, Any]:
  """The attributes of `same` (ours: theirs) in a config.json.

  Raises:
    WeightsError: naming the keys that it lacks.
  """
  missing = [theirs for theirs in same.values() if theirs not in config]
  if missing:
    raise WeightsError(f"the configuration lacks {', '.join(missing)}.")
  return {ours: config[theirs] for ours, theirs in same.items()}


def is_distilled(model: VisionTransformer) -> bool:
  """Whether a model's one register is a distillation token: it has a position, as the class token has."""
  return model.num_registers == 1 and model.position_table is not None and model.position_table.prefix == "all"


def deviations(model: VisionTransformer, fixed: Mapping[str, Any]) -> list[str]:
  """The attributes of a model that are not as they have to be, as text."""
  different = {name: getattr(model, name) for name, value in fixed.items() if getattr(model, name) != value}
  return [f"{name}={value!r} (only {fixed[name]!r})" for name, value in different.items()]


def table_deviations(table: PositionTable | None, **how: Any) -> list[str]:
  """The same for learned positions of class token and patches that are resized in the way given by `how`."""
  if table is None:
    return ["position_table=None"]
  wanted = dict(kind="learned", prefix="cls", antialias=False, offset=0.0) | how
  different = {name: value for name, value in dataclasses.asdict(table).items() if wanted.get(name, value) != value}
  return [f"position_table.{name}={value!r} (only {wanted[name]!r})" for name, value in different.items()]


def square_deviations(table: PositionTable | None) -> list[str]:
  """A grid that is no square, as text, for those who take every grid of positions for one (DINOv2 everywhere)."""
  if table is None or table.grid[0] == table.grid[1]:
    return []
  return [f"position_table.grid={table.grid} (only squares)"]


def refuse(family: str, problems: list[str]) -> None:
  """Raises a WeightsError that names all problems, if there are any."""
  if problems:
    raise WeightsError(
      f"a Hugging Face {family} cannot express this model: " + "; ".join(problems) + '. Save it with format="pth" '
      '(the DINO repositories\' layout) or format="orbax".'
    )


def grid_of(config: Mapping[str, Any]) -> tuple[int, int]:
  """The grid of the position table of a config.json."""
  size = config["image_size"]
  height, width = (size, size) if isinstance(size, int) else size
  return height // config["patch_size"], width // config["patch_size"]


def image_size_of(model: VisionTransformer) -> int | list[int]:
  """The image size of a config.json whose position table is that of the model."""
  rows, columns = (side * model.patch_size for side in model.position_table.grid)
  return rows if rows == columns else [rows, columns]


def unknown_settings(config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
  """Raises a WeightsError that names the settings of a config.json that have other than these values."""
  problems = [f"{key}={config[key]!r} (only {value!r})" for key, value in known.items() if config[key] != value]
  if not isinstance(config["patch_size"], int):
    problems.append(f"patch_size={config['patch_size']}")
  if problems:
    raise WeightsError(f"VisionTransformer has no counterpart for {'; '.join(problems)}.")
