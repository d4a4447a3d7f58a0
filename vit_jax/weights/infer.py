"""Which model a state dict of the DINO repositories or of timm holds, read off its tensor names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from vit_jax.models import ConvNeXt, PositionTable, Rope, VisionTransformer
from vit_jax.weights.errors import WeightsError

# What shapes cannot tell: the values of all published models.
ASSUMED = {"norm_eps": 1e-5, "rope.normalize": "separate", "rope.rescale": 2.0}


# Attention heads by width, where heads are not 64 wide.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


class Recognised(NamedTuple):
  """What a state dict holds.

  Attributes:
    layout: its naming scheme.
    module: the class of the model.
    attributes: of the module.
    assumed: those that leave no trace in a file, by name.
  """

  layout: str
  module: type[nn.Module]
  attributes: dict[str, Any]
  assumed: dict[str, Any]


def recognise(state_dict: Mapping[str, np.ndarray]) -> Recognised:
  """The model of a state dict in a layout of the DINO repositories or of timm.

  Raises:
    WeightsError: if it is of none of these.
  """
  if "downsample_layers.0.0.weight" in state_dict:
    return Recognised("dinov3", ConvNeXt, _convnext(state_dict), {})
  if "patch_embed.proj.weight" not in state_dict or "rope_embed.periods" in state_dict:
    return Recognised("dinov3", VisionTransformer, infer_attributes(state_dict), ASSUMED)
  if "pos_embed" in state_dict and "mask_token" in state_dict:
    attributes = _dinov2(state_dict)
    assumed = {name: attributes[name] for name in ("num_heads", "norm_eps", "position_table")}
    return Recognised("dinov2", VisionTransformer, attributes, assumed)
  attributes = _timm(state_dict)
  assumed = {name: attributes[name] for name in ("num_heads", "norm_eps", "mlp", "pool")}
  return Recognised("timm", VisionTransformer, attributes, assumed)


def infer_attributes(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The attributes of the `VisionTransformer` that a backbone's state dict was saved from.

  The norm epsilon and the way rotary coordinates are normalised leave no trace in a file: `ASSUMED`.

  Raises:
    WeightsError: if the names are not those of a DINOv3 ViT backbone.
  """
  needed = ("cls_token", "patch_embed.proj.weight", "rope_embed.periods", "blocks.0.attn.qkv.weight")
  missing = [name for name in needed if name not in state_dict]
  if missing:
    begin = ", ".join(sorted(state_dict)[:5])
    raise WeightsError(
      f"not the state dict of a DINOv3 ViT backbone: it lacks {', '.join(missing)}; it has {begin}, …."
    )
  shape = {name: np.shape(value) for name, value in state_dict.items()}
  width = shape["cls_token"][-1]
  period = np.asarray(state_dict["rope_embed.periods"], np.float64)
  gated = "blocks.0.mlp.w1.weight" in shape
  hidden = shape.get("blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight", (4 * width,))[0]
  return dict(
    patch_size=shape["patch_embed.proj.weight"][-1],
    width=width,
    depth=1 + max(int(name.split(".")[1]) for name in shape if name.startswith("blocks.")),
    num_heads=width // (4 * period.size),
    mlp="swiglu" if gated else "gelu",
    mlp_hidden=hidden,
    num_registers=shape["storage_tokens"][1] if "storage_tokens" in shape else 0,
    layer_scale=1e-5 if "blocks.0.ls1.gamma" in shape else None,
    qkv_bias="blocks.0.attn.qkv.bias" in shape,
    proj_bias="blocks.0.attn.proj.bias" in shape,
    mlp_bias=f"blocks.0.mlp.{'w1' if gated else 'fc1'}.bias" in shape,
    mask_k_bias="blocks.0.attn.qkv.bias_mask" in shape,
    norm="layernorm" if "norm.bias" in shape else "rmsnorm",
    norm_eps=ASSUMED["norm_eps"],
    separate_cls_norm="cls_norm.weight" in shape,
    separate_local_cls_norm="local_cls_norm.weight" in shape,
    rope=_rope(period),
  )


def _rope(period: np.ndarray) -> Rope:
  """The settings whose periods these are (rounded to bfloat16 or not)."""
  n = period.size
  kept = dict(normalize=ASSUMED["rope.normalize"], rescale=ASSUMED["rope.rescale"])
  if math.isclose(period[0], 1.0, rel_tol=1e-3):
    base = 100.0 if n == 1 else float(period[-1] ** (n / (n - 1)))  # the last period is base^((n - 1) / n)
    rounded = float(f"{base:.2g}")  # a base is a round number; bfloat16 keeps less than three digits
    return Rope(base=rounded if math.isclose(base, rounded, rel_tol=1e-2) else base, **kept)
  return Rope(base=None, min_period=float(period[0]), max_period=float(period[-1]), **kept)


def _convnext(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
  stages = sum(name.startswith("downsample_layers.") and name.endswith("1.weight") for name in state_dict)
  depths = tuple(
    sum(name.startswith(f"stages.{i}.") and name.endswith(".gamma") for name in state_dict) for i in range(stages)
  )
  widths = tuple(np.shape(state_dict[f"stages.{i}.0.gamma"])[0] for i in range(stages))
  return dict(depths=depths, widths=widths)


def _trunk(shape: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
  """What the names that DINOv2 and timm share say."""
  width, _, patch_size, _ = shape["patch_embed.proj.weight"]
  blocks = [int(name.split(".")[1]) for name in shape if name.startswith("blocks.")]
  if "blocks.0.attn.qkv.weight" not in shape:
    raise WeightsError("not the state dict of a ViT backbone: it lacks blocks.0.attn.qkv.weight.")
  return dict(
    patch_size=patch_size,
    width=width,
    depth=1 + max(blocks),
    num_heads=HEADS.get(width, max(width // 64, 1)),
    proj_bias="blocks.0.attn.proj.bias" in shape,
  )


def _dinov2(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
  shape = {name: np.shape(value) for name, value in state_dict.items()}
  packed = shape.get("blocks.0.mlp.w12.weight")
  registers = shape["register_tokens"][1] if "register_tokens" in shape else 0
  grid = _square(shape["pos_embed"][1] - 1)
  table = PositionTable(grid, antialias=True) if registers else PositionTable(grid, offset=0.1)
  return _trunk(shape) | dict(
    mlp="swiglu" if packed else "gelu",
    mlp_hidden=packed[0] // 2 if packed else shape["blocks.0.mlp.fc1.weight"][0],
    num_registers=registers,
    layer_scale=1e-5 if "blocks.0.ls1.gamma" in shape else None,
    qkv_bias="blocks.0.attn.qkv.bias" in shape,
    mlp_bias="blocks.0.mlp.w12.bias" in shape or "blocks.0.mlp.fc1.bias" in shape,
    norm_eps=1e-6,
    rope=None,
    position_table=table,
  )


def _timm(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
  shape = {name: np.shape(value) for name, value in state_dict.items()}
  rotary, has_class = "pos_embed" not in shape, "cls_token" in shape
  trunk, registers = _trunk(shape), shape["reg_token"][1] if "reg_token" in shape else 0
  down = shape["blocks.0.mlp.fc2.weight"]
  gated = "blocks.0.mlp.fc1_g.weight" in shape or shape["blocks.0.mlp.fc1.weight"][0] == 2 * down[1]
  if "blocks.0.attn.q_norm.weight" in shape:
    trunk["num_heads"] = trunk["width"] // shape["blocks.0.attn.q_norm.weight"][0]
  pool = "map" if "attn_pool.latent" in shape else "avg" if "fc_norm.weight" in shape or not has_class else "cls"
  return trunk | dict(
    mlp="swiglu" if gated else "gelu",
    mlp_hidden=down[1],
    class_token=has_class,
    masking=False,
    num_registers=registers,
    layer_scale=1e-5 if "blocks.0.ls1.gamma" in shape or "blocks.0.gamma_1" in shape else None,
    qkv_bias="blocks.0.attn.qkv.bias" in shape or "blocks.0.attn.q_bias" in shape,
    mask_k_bias="blocks.0.attn.q_bias" in shape,
    mlp_bias="blocks.0.mlp.fc2.bias" in shape,
    patch_bias="patch_embed.proj.bias" in shape,
    qk_norm="blocks.0.attn.q_norm.weight" in shape,
    pre_norm="norm_pre.weight" in shape,
    norm_eps=1e-5 if rotary else 1e-6,
    rope=Rope(rescale=ASSUMED["rope.rescale"]) if rotary else None,
    position_table=None if rotary else _timm_table(shape["pos_embed"][1], has_class, registers),
    pool=pool,
    pool_norm="fc_norm.weight" in shape,
  )


def _timm_table(rows: int, has_class: bool, registers: int) -> PositionTable:
  """The table of a square grid that has so many rows, with positions of tokens before the patches or without."""
  for prefix, count in (("none", 0), ("cls", int(has_class)), ("all", int(has_class) + registers)):
    if math.isqrt(rows - count) ** 2 == rows - count:
      return PositionTable(_square(rows - count), prefix=prefix, antialias=True)
  raise WeightsError(
    f"pos_embed has {rows} rows, which is no square grid: pass position_table=PositionTable((h, w), …)."
  )


def _square(rows: int) -> tuple[int, int]:
  side = math.isqrt(rows)
  if side * side != rows:
    raise WeightsError(f"the position table has {rows} patches, which is no square grid.")
  return side, side
