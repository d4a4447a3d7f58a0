"""Which architecture a state dict of layout "dinov3" holds, read off its tensor shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.models import Rope
from vit_jax.weights.errors import WeightsError

# What shapes cannot tell: the values of all published models.
ASSUMED = {"norm_eps": 1e-5, "rope.normalize": "separate", "rope.rescale": 2.0}


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
