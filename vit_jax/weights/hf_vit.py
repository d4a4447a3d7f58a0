"""Hugging Face's ViT (model_type "vit") and distilled DeiT ("deit"): tensor names and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_jax.models import PositionTable, VisionTransformer
from vit_jax.weights import family
from vit_jax.weights.layout import CONVOLUTION, Layout, Row, dense, linear, norm, separate_qkv, token

MODEL_TYPE, DISTILLED = "vit", "deit"

_ROWS = (
  Row("cls_token", "embeddings.cls_token", token(2)),
  Row("positions", "embeddings.position_embeddings", token(1)),
  *dense("patch_embed", "embeddings.patch_embeddings.projection", CONVOLUTION),
  *norm("blocks/norm1", "encoder.layer.{i}.layernorm_before"),
  *separate_qkv(f"encoder.layer.{{i}}.attention.attention.{name}" for name in ("query", "key", "value")),
  *dense("blocks/attn/proj", "encoder.layer.{i}.attention.output.dense", linear(inputs=2)),
  *norm("blocks/norm2", "encoder.layer.{i}.layernorm_after"),
  *dense("blocks/mlp/fc1", "encoder.layer.{i}.intermediate.dense"),
  *dense("blocks/mlp/fc2", "encoder.layer.{i}.output.dense"),
  *norm("final_norm", "layernorm"),
)

_DISTILLATION = (Row("registers", "embeddings.distillation_token", token(1)),)

HF_VIT = Layout(
  lambda model: _ROWS + (_DISTILLATION if family.is_distilled(model) else ()),
  (VisionTransformer,),
  # Classifiers, and what only masked modelling needs.
  outside=("classifier.", "cls_classifier.", "distillation_classifier.", "pooler.", "embeddings.mask_token"),
  hint='the Hugging Face ViT has no such tensor: keep it with format="timm" or format="orbax"',
)

_FIXED = family.PLAIN | dict(
  rope=None, num_registers=0, masking=False, layer_scale=None, mask_k_bias=False, proj_bias=True, mlp_bias=True
)
_FIXED_DISTILLED = _FIXED | dict(num_registers=1, pool="distilled")
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}  # ours: theirs
_SAME = family.SAME | {"mlp_hidden": "intermediate_size", "qkv_bias": "qkv_bias"}  # ours: theirs
_DEFAULTS = {  # of transformers, for keys that a config.json may leave out
  "num_channels": 3,
  "patch_size": 16,
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "image_size": 224,
  "qkv_bias": True,
}


def resizing(model: VisionTransformer) -> dict[str, Any]:
  """How Hugging Face resizes the positions of a model: the attributes of a `PositionTable`."""
  return dict(antialias=False, offset=0.0)


def to_config(model: VisionTransformer, image_size: int) -> dict[str, Any]:
  """The config.json of a model; its image size is that of the position table.

  Raises:
    WeightsError: if Hugging Face's ViT cannot express the model; names every attribute that is in the way.
  """
  distilled = family.is_distilled(model)
  prefix = "all" if distilled else "cls"
  problems = family.deviations(model, _FIXED_DISTILLED if distilled else _FIXED)
  problems += family.table_deviations(model.position_table, prefix=prefix, **resizing(model))
  if model.mlp not in _ACTIVATIONS:
    problems.append(f"mlp={model.mlp!r}")
  family.refuse("DeiT" if distilled else "ViT", problems)
  return family.make_config(
    model,
    DISTILLED if distilled else MODEL_TYPE,
    "DeiTModel" if distilled else "ViTModel",
    _SAME,
    intermediate_size=model.mlp_hidden or 4 * model.width,
    image_size=family.image_size_of(model),
    hidden_act=_ACTIVATIONS[model.mlp],
  )


def to_attributes(config: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `VisionTransformer` that a config.json describes.

  Raises:
    WeightsError: for settings that no `VisionTransformer` has; names them.
  """
  c = _DEFAULTS | dict(config)
  names = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {"gelu_new": "gelu_tanh"}
  if c["hidden_act"] not in names:
    family.unknown_settings(c, {"hidden_act": "gelu"})
  family.unknown_settings(c, {})
  attributes = family.same_attributes(c, _SAME) | dict(mlp=names[c["hidden_act"]], masking=False, rope=None)
  if c["model_type"] == DISTILLED:
    table = PositionTable(family.grid_of(c), prefix="all")
    return attributes | dict(position_table=table, num_registers=1, pool="distilled")
  return attributes | dict(position_table=PositionTable(family.grid_of(c)))
