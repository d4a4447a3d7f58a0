"""Layout "hf_dinov3": the tensor names of `transformers` DINOv3 ViT checkpoints (model_type "dinov3_vit")."""

from __future__ import annotations

import functools
from typing import Any

from vit_jax.models import VisionTransformer
from vit_jax.weights.layout import (
  CONVOLUTION,
  FLAT,
  Layout,
  Row,
  dense,
  linear,
  no_registers,
  norm,
  separate_qkv,
  token,
)

_HINT = 'the Hugging Face DINOv3 ViT has no such tensor: keep it with layout "dinov3" (format="pth") or format="orbax"'


_REGISTERS = "embeddings.register_tokens"


def _projections(mask_k_bias: bool) -> tuple[Row, ...]:
  rows = separate_qkv(f"layer.{{i}}.attention.{letter}_proj" for letter in "qkv")
  # A key bias without effect is not stored.
  return tuple(row for row in rows if not (mask_k_bias and row.name.endswith("k_proj.bias")))


def _rows(model: Any) -> tuple[Row, ...]:
  gated = model.mlp == "swiglu"
  mlp = (
    (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj"))
    if gated
    else (("fc1", "up_proj"), ("fc2", "down_proj"))
  )
  return (
    Row("cls_token", "embeddings.cls_token", token(2)),
    Row("registers", _REGISTERS, token(1)),
    Row("mask_token", "embeddings.mask_token", token(2)),
    *dense("patch_embed", "embeddings.patch_embeddings", CONVOLUTION),
    *norm("blocks/norm1", "layer.{i}.norm1"),
    *_projections(model.mask_k_bias),
    *dense("blocks/attn/proj", "layer.{i}.attention.o_proj", linear(inputs=2)),
    Row("blocks/ls1/gamma", "layer.{i}.layer_scale1.lambda1", FLAT),
    *norm("blocks/norm2", "layer.{i}.norm2"),
    *(row for ours, theirs in mlp for row in dense(f"blocks/mlp/{ours}", f"layer.{{i}}.mlp.{theirs}")),
    Row("blocks/ls2/gamma", "layer.{i}.layer_scale2.lambda1", FLAT),
    *norm("final_norm", "norm"),
  )


HF_DINOV3 = Layout(_rows, (VisionTransformer,), functools.partial(no_registers, _REGISTERS), hint=_HINT)
