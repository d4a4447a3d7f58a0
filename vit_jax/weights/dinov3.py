"""Layout "dinov3": the tensor names of the DINOv3 repository, ViT and ConvNeXt backbones (flat hub files),
projection heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vit_jax.models import ConvNeXt, ProjectionHead, VisionTransformer
from vit_jax.models.positions import rope_periods
from vit_jax.weights.layout import CONVOLUTION, FLAT, LINEAR, Buffer, Layout, Row, dense, norm, token
from vit_jax.weights.trunk import LAYER_SCALE, QKV_BIAS, TRUNK

_HINT = 'the DINOv3 repository has no such tensor: keep it with format="orbax"'

_BACKBONE = (
  Row("cls_token", "cls_token", token(2)),
  Row("registers", "storage_tokens", token(1)),
  Row("mask_token", "mask_token", token(1)),
  *TRUNK,
  *QKV_BIAS,
  *LAYER_SCALE,
  *dense("blocks/mlp/gate", "blocks.{i}.mlp.w1"),
  *dense("blocks/mlp/up", "blocks.{i}.mlp.w2"),
  *dense("blocks/mlp/down", "blocks.{i}.mlp.w3"),
  *norm("final_norm", "norm"),
  *norm("cls_norm", "cls_norm"),
  *norm("local_cls_norm", "local_cls_norm"),
)


def _rows(model: Any) -> tuple[Row, ...]:
  if isinstance(model, ConvNeXt):
    return _convnext(len(model.depths))
  if not isinstance(model, ProjectionHead):
    return _BACKBONE
  names = ["mlp"] if model.num_layers == 1 else [f"mlp.{2 * i}" for i in range(model.num_layers)]  # GELUs in between
  layers = [row for i, name in enumerate(names, start=1) for row in dense(f"fc{i}", name)]
  return *layers, Row("last_layer/kernel", "last_layer.weight", LINEAR)


def _convnext(stages: int) -> tuple[Row, ...]:
  rows = []
  for i in range(stages):
    conv, scale = (0, 1) if i == 0 else (1, 0)
    rows += [
      *dense(f"downsample{i}/conv", f"downsample_layers.{i}.{conv}", CONVOLUTION),
      *norm(f"downsample{i}/norm", f"downsample_layers.{i}.{scale}"),
      *dense(f"stage{i}/layers/dwconv", f"stages.{i}.{{i}}.dwconv", CONVOLUTION),
      *norm(f"stage{i}/layers/norm", f"stages.{i}.{{i}}.norm"),
      *dense(f"stage{i}/layers/mlp/fc1", f"stages.{i}.{{i}}.pwconv1"),
      *dense(f"stage{i}/layers/mlp/fc2", f"stages.{i}.{{i}}.pwconv2"),
      Row(f"stage{i}/layers/ls/gamma", f"stages.{i}.{{i}}.gamma", FLAT),
    ]
  # The repository has the final norm a second time, as that of the last stage.
  alias = (dataclasses.replace(row, copy=True) for row in norm("final_norm", f"norms.{stages - 1}"))
  return (*rows, *norm("final_norm", "norm"), *alias)


def _buffers(model: Any) -> tuple[Buffer, ...]:
  if isinstance(model, ProjectionHead | ConvNeXt):
    return ()
  found = []
  if model.rope is not None:
    periods = np.asarray(rope_periods(model.rope, model.width // model.num_heads))
    found.append(Buffer("rope_embed.periods", periods, rtol=1e-2, meaning="the model's rope (base, periods)"))
  if model.mask_k_bias and model.qkv_bias:
    mask = np.repeat(np.array([1, 0, 1], np.float32), model.width)  # [3D]
    meaning = "ones for query and value, zeros for key"
    found += [Buffer(f"blocks.{i}.attn.qkv.bias_mask", mask, meaning=meaning) for i in range(model.depth)]
  return tuple(found)


DINOV3 = Layout(_rows, (VisionTransformer, ConvNeXt, ProjectionHead), _buffers, hint=_HINT)
