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
  """

  layout: str
  module: type[nn.Module]
  to_attributes: Callable[[Mapping[str, Any]], dict[str, Any]]
  to_config: Callable[[Any, int], dict[str, Any]]
  masking: bool | None = None


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
