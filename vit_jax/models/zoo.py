"""Model names: the published DINOv3 and DINOv2 backbones, what the DINOv3 repository trains, and plain ViTs.

The plain ViTs (`vit_ti16` … `vit_h14`) are those of Dosovitskiy et al. 2021 and, for Ti, S and B, of DeiT (Touvron et
al. 2021), whose distilled variants (`deit_…_distilled`) have one register, with a position: the distillation token.
Their feature is the mean of it and the class token (DeiT averages the classifiers of the two). Others are theirs with
attributes replaced: `create_model("vit_b16", class_token=False, pool="avg", position_table=…)`.
"""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

from vit_jax.models.convnext import ConvNeXt
from vit_jax.models.position_table import PositionTable
from vit_jax.models.positions import Rope
from vit_jax.models.vit import VisionTransformer

# What all published DINOv3 ViTs share (reference section 1.1).
_DINOV3 = dict(
  patch_size=16, num_registers=4, layer_scale=1e-5, mask_k_bias=True, norm_eps=1e-5, rope=Rope(rescale=2.0)
)
# What the reference's training configs start from.
_PLAIN = dict(patch_size=16, layer_scale=1e-5, norm_eps=1e-6, rope=Rope())

# Published DINOv2: learned positions of 518 pixels; resized differently without and with registers.
_DINOV2 = dict(patch_size=14, layer_scale=1e-5, norm_eps=1e-6, rope=None)
_DINOV2_PLAIN = _DINOV2 | dict(position_table=PositionTable((37, 37), offset=0.1))
_DINOV2_REG = _DINOV2 | dict(position_table=PositionTable((37, 37), antialias=True), num_registers=4)


def _vit(patch_size: int, **sizes: Any) -> dict[str, Any]:
  """A plain ViT with learned positions of 224 pixels."""
  table = PositionTable((224 // patch_size,) * 2)
  return dict(patch_size=patch_size, norm_eps=1e-6, rope=None, position_table=table, masking=False) | sizes


def _deit_distilled(**sizes: Any) -> dict[str, Any]:
  return _vit(16, num_registers=1, position_table=PositionTable((14, 14), prefix="all"), pool="distilled", **sizes)


def _sizes(width: int, depth: int, num_heads: int, mlp_hidden: int, mlp: str = "gelu") -> dict[str, Any]:
  return dict(width=width, depth=depth, num_heads=num_heads, mlp_hidden=mlp_hidden, mlp=mlp)


_TI, _S, _B = _sizes(192, 12, 3, 768), _sizes(384, 12, 6, 1536), _sizes(768, 12, 12, 3072)
_L, _H = _sizes(1024, 24, 16, 4096), _sizes(1280, 32, 16, 5120)
_G = _sizes(1536, 40, 24, 4096, "swiglu")
_7B = _sizes(4096, 40, 32, 8192, "swiglu") | dict(qkv_bias=False, separate_local_cls_norm=True)

_VITS: dict[str, dict[str, Any]] = {
  "dinov3_vits16": _DINOV3 | _S,
  "dinov3_vits16plus": _DINOV3 | _sizes(384, 12, 6, 1536, "swiglu"),
  "dinov3_vitb16": _DINOV3 | _B,
  "dinov3_vitl16": _DINOV3 | _L,
  "dinov3_vitl16_sat": _DINOV3 | _L | dict(separate_local_cls_norm=True),
  "dinov3_vitl16plus": _DINOV3 | _sizes(1024, 24, 16, 4096, "swiglu"),
  "dinov3_vith16plus": _DINOV3 | _sizes(1280, 32, 20, 5120, "swiglu"),
  "dinov3_vit7b16": _DINOV3 | _7B,
  "dinov3_vit7b16_sat": _DINOV3 | _7B,
  "vit_small": _PLAIN | _S,
  "vit_base": _PLAIN | _B,
  "vit_large": _PLAIN | _L,
  "vit_so400m": _PLAIN | _sizes(1152, 27, 18, 4352),
  "vit_huge2": _PLAIN | _sizes(1280, 32, 20, 5120),
  "vit_giant2": _PLAIN | _sizes(1536, 40, 24, 6144),
  "vit_7b": _PLAIN | _7B | dict(num_registers=4),
  **{f"dinov2_vit{size}14": _DINOV2_PLAIN | values for size, values in zip("sblg", (_S, _B, _L, _G), strict=True)},
  **{f"dinov2_vit{size}14_reg": _DINOV2_REG | values for size, values in zip("sblg", (_S, _B, _L, _G), strict=True)},
  "vit_ti16": _vit(16, **_TI),
  "vit_s16": _vit(16, **_S),
  "vit_s32": _vit(32, **_S),
  "vit_b16": _vit(16, **_B),
  "vit_b32": _vit(32, **_B),
  "vit_l16": _vit(16, **_L),
  "vit_l32": _vit(32, **_L),
  "vit_h14": _vit(14, **_H),
  "deit_ti16_distilled": _deit_distilled(**_TI),
  "deit_s16_distilled": _deit_distilled(**_S),
  "deit_b16_distilled": _deit_distilled(**_B),
}

_CONVNEXTS: dict[str, dict[str, Any]] = {
  "dinov3_convnext_tiny": dict(depths=(3, 3, 9, 3), widths=(96, 192, 384, 768)),
  "dinov3_convnext_small": dict(depths=(3, 3, 27, 3), widths=(96, 192, 384, 768)),
  "dinov3_convnext_base": dict(depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)),
  "dinov3_convnext_large": dict(depths=(3, 3, 27, 3), widths=(192, 384, 768, 1536)),
}

# name: (class, attributes)
MODELS: dict[str, tuple[type[VisionTransformer] | type[ConvNeXt], dict[str, Any]]] = {
  **{name: (VisionTransformer, attributes) for name, attributes in _VITS.items()},
  **{name: (ConvNeXt, attributes) for name, attributes in _CONVNEXTS.items()},
}


def list_models(pattern: str = "*") -> list[str]:
  """The names that `create_model` knows and that match a pattern, as of files: `list_models("dinov3*")`; sorted."""
  return sorted(fnmatch.filter(MODELS, pattern))


def create_model(name: str, **overrides: Any) -> VisionTransformer | ConvNeXt:
  """A model by name, with any of its attributes overridden.

  Raises:
    ValueError: for an unknown name or attribute, naming the nearest ones.
  """
  if name not in MODELS:
    near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.3)
    which = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(sorted(MODELS))}"
    raise ValueError(f"model.name: there is no model {name!r}; {which}.")
  module, attributes = MODELS[name]
  known = set(module.__dataclass_fields__) - {"parent", "name"}
  for key in overrides:
    if key not in known:
      near = difflib.get_close_matches(key, known, n=3, cutoff=0.3) or sorted(known)
      raise ValueError(f"{module.__name__} models have no attribute {key!r}; nearest: {', '.join(near)}.")
  return module(**(attributes | overrides))
