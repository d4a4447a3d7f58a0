"""Hugging Face's DINOv2 (model_type "dinov2" and "dinov2_with_registers"): tensor names and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_jax.models import PositionTable, VisionTransformer
from vit_jax.weights import family
from vit_jax.weights.layout import (
  CONVOLUTION,
  FLAT,
  LINEAR,
  Buffer,
  Layout,
  Row,
  dense,
  linear,
  no_registers,
  norm,
  separate_qkv,
  token,
)

MODEL_TYPE, WITH_REGISTERS = "dinov2", "dinov2_with_registers"

_REGISTERS = "embeddings.register_tokens"

_SWIGLU = tuple(
  Row(f"blocks/mlp/{ours}/{kind}", f"encoder.layer.{{i}}.mlp.weights_in.{theirs}", form, chunk=(index, 2))
  for index, ours in enumerate(("gate", "up"))
  for kind, theirs, form in (("kernel", "weight", LINEAR), ("bias", "bias", FLAT))
)

_ROWS = (
  Row("cls_token", "embeddings.cls_token", token(2)),
  Row("mask_token", "embeddings.mask_token", token(1)),
  Row("positions", "embeddings.position_embeddings", token(1)),
  Row("registers", _REGISTERS, token(1)),
  *dense("patch_embed", "embeddings.patch_embeddings.projection", CONVOLUTION),
  *norm("blocks/norm1", "encoder.layer.{i}.norm1"),
  *separate_qkv(f"encoder.layer.{{i}}.attention.attention.{name}" for name in ("query", "key", "value")),
  *dense("blocks/attn/proj", "encoder.layer.{i}.attention.output.dense", linear(inputs=2)),
  Row("blocks/ls1/gamma", "encoder.layer.{i}.layer_scale1.lambda1", FLAT),
  *norm("blocks/norm2", "encoder.layer.{i}.norm2"),
  *dense("blocks/mlp/fc1", "encoder.layer.{i}.mlp.fc1"),
  *dense("blocks/mlp/fc2", "encoder.layer.{i}.mlp.fc2"),
  *_SWIGLU,
  *dense("blocks/mlp/down", "encoder.layer.{i}.mlp.weights_out"),
  Row("blocks/ls2/gamma", "encoder.layer.{i}.layer_scale2.lambda1", FLAT),
  *norm("final_norm", "layernorm"),
)

def _buffers(model: VisionTransformer) -> tuple[Buffer, ...]:
  return no_registers(_REGISTERS, model) if has_registers(model) else ()


HF_DINOV2 = Layout(
  lambda model: _ROWS,
  (VisionTransformer,),
  _buffers,
  outside=("classifier.",),
  hint='the Hugging Face DINOv2 has no such tensor: keep it with format="pth" or format="orbax"',
)

_FIXED = family.PLAIN | dict(rope=None, mask_k_bias=False, proj_bias=True, mlp_bias=True)
_SAME = family.SAME | {"qkv_bias": "qkv_bias", "layer_scale": "layerscale_value"}  # ours: theirs
_DEFAULTS = {  # of transformers, for keys that a config.json may leave out
  "num_channels": 3,
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "mlp_ratio": 4,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-6,
  "image_size": 224,
  "qkv_bias": True,
  "layerscale_value": 1.0,
  "use_swiglu_ffn": False,
  "use_mask_token": True,
}


def has_registers(model: VisionTransformer) -> bool:
  """Whether a model is of the type with registers, of which there may be none: it resizes its positions otherwise."""
  return model.num_registers > 0 or (model.position_table is not None and model.position_table.antialias)


def resizing(model: VisionTransformer) -> dict[str, Any]:
  """How Hugging Face resizes the positions of a model: the attributes of a `PositionTable`."""
  return dict(antialias=has_registers(model), offset=0.0)


def to_config(model: VisionTransformer, image_size: int) -> dict[str, Any]:
  """The config.json of a model; its image size is that of the position table.

  Raises:
    WeightsError: if Hugging Face's DINOv2 cannot express the model; names every attribute that is in the way.
  """
  gated, with_registers = model.mlp == "swiglu", has_registers(model)
  ratio = _ratio(model)
  problems = family.deviations(model, _FIXED) + family.table_deviations(model.position_table, **resizing(model))
  if model.layer_scale is None:
    problems.append("layer_scale=None (its blocks always have one)")
  if model.mlp not in ("gelu", "swiglu"):
    problems.append(f"mlp={model.mlp!r}")
  if with_registers and not model.masking:
    problems.append("masking=False with registers")
  problems += family.square_deviations(model.position_table)
  if ratio is None:
    problems.append(f"mlp_hidden={model.mlp_hidden} (its mlp_ratio is a whole number)")
  family.refuse("DINOv2", problems)
  specific = {"num_register_tokens": model.num_registers} if with_registers else {"use_mask_token": model.masking}
  return family.make_config(
    model,
    WITH_REGISTERS if with_registers else MODEL_TYPE,
    "Dinov2WithRegistersModel" if with_registers else "Dinov2Model",
    _SAME,
    image_size=family.image_size_of(model),
    mlp_ratio=ratio,
    hidden_act="gelu",
    use_swiglu_ffn=gated,
    **specific,
  )


def to_attributes(config: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `VisionTransformer` that a config.json describes.

  Raises:
    WeightsError: for settings that no `VisionTransformer` has; names them.
  """
  with_registers = config["model_type"] == WITH_REGISTERS
  c = _DEFAULTS | {"patch_size": 16 if with_registers else 14, "num_register_tokens": 4} | dict(config)
  family.unknown_settings(c, {"hidden_act": "gelu"})
  gated = c["use_swiglu_ffn"]
  return dict(
    **family.same_attributes(c, _SAME),
    mlp="swiglu" if gated else "gelu",
    mlp_hidden=_hidden(c["hidden_size"], c["mlp_ratio"], gated),
    num_registers=c["num_register_tokens"] if with_registers else 0,
    masking=with_registers or c["use_mask_token"],
    rope=None,
    position_table=PositionTable(family.grid_of(c), antialias=with_registers),
  )


def _hidden(width: int, ratio: float, gated: bool) -> int:
  """Channels of the feed-forward branch; a gated one has two thirds of them, rounded up to a multiple of 8."""
  hidden = int(width * ratio)
  return -(-int(hidden * 2 / 3) // 8) * 8 if gated else hidden


def _ratio(model: VisionTransformer) -> int | None:
  """The whole number from which `_hidden` makes the model's; None: there is none."""
  hidden = model.mlp_hidden or 4 * model.width
  around = hidden * (1.5 if model.mlp == "swiglu" else 1.0) / model.width
  near = (int(around), int(around) + 1)
  return next((ratio for ratio in near if _hidden(model.width, ratio, model.mlp == "swiglu") == hidden), None)
