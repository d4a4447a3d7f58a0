"""The families of Hugging Face models, by the `model_type` of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from vit_jax.models import ConvNeXt, VisionTransformer
from vit_jax.weights import hf_config, hf_convnext, hf_dinov2, hf_vit
from vit_jax.weights.errors import WeightsError
from vit_jax.weights.family import Family

_DINOV2 = Family(
  "hf_dinov2", VisionTransformer, hf_dinov2.to_attributes, hf_dinov2.to_config, resizing=hf_dinov2.resizing
)
_VIT = Family("hf_vit", VisionTransformer, hf_vit.to_attributes, hf_vit.to_config, False, hf_vit.resizing)

FAMILIES: dict[str, Family] = {
  hf_config.MODEL_TYPE: Family("hf_dinov3", VisionTransformer, hf_config.to_attributes, hf_config.to_config, True),
  hf_convnext.MODEL_TYPE: Family("hf_dinov3_convnext", ConvNeXt, hf_convnext.to_attributes, hf_convnext.to_config),
  hf_dinov2.MODEL_TYPE: _DINOV2,
  hf_dinov2.WITH_REGISTERS: _DINOV2._replace(masking=True),
  hf_vit.MODEL_TYPE: _VIT,
  hf_vit.DISTILLED: _VIT,
}


def family_of_config(config: Mapping[str, Any]) -> Family:
  """The family of a config.json.

  Raises:
    WeightsError: if it is none of ours.
  """
  kind = config.get("model_type")
  if kind not in FAMILIES:
    raise WeightsError(f"model_type {kind!r} is not known; {', '.join(FAMILIES)} are.")
  return FAMILIES[kind]


def family_of_model(model: nn.Module) -> Family:
  """The family that is nearest to a model; its `to_config` says whether it can express it."""
  if isinstance(model, ConvNeXt):
    return FAMILIES[hf_convnext.MODEL_TYPE]
  if model.position_table is None:
    return FAMILIES[hf_config.MODEL_TYPE]
  if model.layer_scale is None:
    return FAMILIES[hf_vit.MODEL_TYPE]
  return FAMILIES[hf_dinov2.WITH_REGISTERS if hf_dinov2.has_registers(model) else hf_dinov2.MODEL_TYPE]
