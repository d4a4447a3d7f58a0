"""Hugging Face's DINOv3 ConvNeXt (model_type "dinov3_convnext"): tensor names and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_jax.models import ConvNeXt
from vit_jax.weights import family
from vit_jax.weights.errors import WeightsError
from vit_jax.weights.layout import CONVOLUTION, FLAT, Layout, Row, dense, norm

MODEL_TYPE = "dinov3_convnext"

_SAME = {  # ours: theirs
  "in_channels": "num_channels",
  "depths": "depths",
  "widths": "hidden_sizes",
  "norm_eps": "layer_norm_eps",
  "layer_scale": "layer_scale_init_value",
}
_DEFAULTS = {  # of transformers, for keys that a config.json may leave out
  "num_channels": 3,
  "hidden_sizes": (96, 192, 384, 768),
  "depths": (3, 3, 9, 3),
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-6,
  "layer_scale_init_value": 1e-6,
}


def _rows(model: ConvNeXt) -> tuple[Row, ...]:
  rows = []
  for i in range(len(model.depths)):
    conv, scale = (0, 1) if i == 0 else (1, 0)
    block = f"stages.{i}.layers.{{i}}"
    rows += [
      *dense(f"downsample{i}/conv", f"stages.{i}.downsample_layers.{conv}", CONVOLUTION),
      *norm(f"downsample{i}/norm", f"stages.{i}.downsample_layers.{scale}"),
      *dense(f"stage{i}/layers/dwconv", f"{block}.depthwise_conv", CONVOLUTION),
      *norm(f"stage{i}/layers/norm", f"{block}.layer_norm"),
      *dense(f"stage{i}/layers/mlp/fc1", f"{block}.pointwise_conv1"),
      *dense(f"stage{i}/layers/mlp/fc2", f"{block}.pointwise_conv2"),
      Row(f"stage{i}/layers/ls/gamma", f"{block}.gamma", FLAT),
    ]
  return (*rows, *norm("final_norm", "layer_norm"))


HF_DINOV3_CONVNEXT = Layout(_rows, modules=(ConvNeXt,))


def to_config(model: ConvNeXt, image_size: int) -> dict[str, Any]:
  """The config.json of a model."""
  return family.make_config(
    model,
    MODEL_TYPE,
    "DINOv3ConvNextModel",
    _SAME,
    hidden_act="gelu",
    image_size=image_size,
  )


def to_attributes(config: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `ConvNeXt` that a config.json describes.

  Raises:
    WeightsError: for settings that no `ConvNeXt` has.
  """
  c = _DEFAULTS | dict(config)
  if c["hidden_act"] != "gelu":
    raise WeightsError(f"ConvNeXt has no counterpart for hidden_act={c['hidden_act']!r} instead of 'gelu'.")
  attributes = family.same_attributes(c, _SAME)
  return attributes | {name: tuple(attributes[name]) for name in ("depths", "widths")}
