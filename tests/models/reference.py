"""The models that the golden files of the reference's backbones were made with."""

from __future__ import annotations

from typing import Any

from tests.golden import Golden
from vit_jax.models import Rope, VisionTransformer

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}


def reference_vit(golden: Golden, **overrides: Any) -> VisionTransformer:
  """The ViT of a golden file's settings, with other attributes in `overrides`."""
  s, rope = golden.settings, golden.settings["rope"]
  tensors = golden.under("sd").items()
  hidden = next(a.shape[0] for k, a in tensors if k.startswith("blocks.0.mlp") and k.endswith("weight"))
  attributes = dict(
    patch_size=s["patch_size"],
    width=s["width"],
    depth=s["depth"],
    num_heads=s["heads"],
    mlp="gelu" if s["ffn"] == "mlp" else "swiglu",
    mlp_hidden=hidden,
    num_registers=s["storage_tokens"],
    layer_scale=1e-5 if s["layer_scale"] else None,
    qkv_bias=s["qkv_bias"],
    proj_bias=s["proj_bias"],
    mlp_bias=s["ffn_bias"],
    mask_k_bias=s["mask_k_bias"],
    norm="rmsnorm" if s["norm"] == "rmsnorm" else "layernorm",
    norm_eps=s["norm_eps"],
    separate_cls_norm=s["untie_cls_and_patch_norms"],
    separate_local_cls_norm=s["untie_global_and_local_cls_norm"],
    rope=Rope(
      base=rope["base"],
      min_period=rope["min_period"],
      max_period=rope["max_period"],
      normalize=rope["normalize_coords"],
      shift=rope["shift"],
      jitter=rope["jitter"],
      rescale=rope["rescale"],
      dtype=DTYPES[rope["dtype"]],
    ),
    drop_path=s["drop_path_rate"],
    dtype=s["dtype"],
    param_dtype=s["dtype"],
  )
  return VisionTransformer(**(attributes | overrides))
