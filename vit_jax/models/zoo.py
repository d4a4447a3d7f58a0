"""Model names: the published DINOv3 backbones and the architectures that the reference trains."""

from __future__ import annotations

import difflib
from typing import Any

from vit_jax.models.convnext import ConvNeXt
from vit_jax.models.positions import Rope
from vit_jax.models.vit import VisionTransformer

# What all published DINOv3 ViTs share (reference section 1.1).
_DINOV3 = dict(
  patch_size=16, num_registers=4, layer_scale=1e-5, mask_k_bias=True, norm_eps=1e-5, rope=Rope(rescale=2.0)
)
# What the reference's training configs start from.
_PLAIN = dict(patch_size=16, layer_scale=1e-5, norm_eps=1e-6, rope=Rope())


def _sizes(width: int, depth: int, num_heads: int, mlp_hidden: int, mlp: str = "gelu") -> dict[str, Any]:
  return dict(width=width, depth=depth, num_heads=num_heads, mlp_hidden=mlp_hidden, mlp=mlp)


_7B = dict(qkv_bias=False, separate_local_cls_norm=True)

_VITS: dict[str, dict[str, Any]] = {
  "dinov3_vits16": _DINOV3 | _sizes(384, 12, 6, 1536),
  "dinov3_vits16plus": _DINOV3 | _sizes(384, 12, 6, 1536, "swiglu"),
  "dinov3_vitb16": _DINOV3 | _sizes(768, 12, 12, 3072),
  "dinov3_vitl16": _DINOV3 | _sizes(1024, 24, 16, 4096),
  "dinov3_vitl16_sat": _DINOV3 | _sizes(1024, 24, 16, 4096) | dict(separate_local_cls_norm=True),
  "dinov3_vitl16plus": _DINOV3 | _sizes(1024, 24, 16, 4096, "swiglu"),
  "dinov3_vith16plus": _DINOV3 | _sizes(1280, 32, 20, 5120, "swiglu"),
  "dinov3_vit7b16": _DINOV3 | _sizes(4096, 40, 32, 8192, "swiglu") | _7B,
  "vit_small": _PLAIN | _sizes(384, 12, 6, 1536),
  "vit_base": _PLAIN | _sizes(768, 12, 12, 3072),
  "vit_large": _PLAIN | _sizes(1024, 24, 16, 4096),
  "vit_so400m": _PLAIN | _sizes(1152, 27, 18, 4352),
  "vit_huge2": _PLAIN | _sizes(1280, 32, 20, 5120),
  "vit_giant2": _PLAIN | _sizes(1536, 40, 24, 6144),
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


def create_model(name: str, **overrides: Any) -> VisionTransformer | ConvNeXt:
  """A model by name, with any of its attributes overridden.

  Raises:
    ValueError: for an unknown name or attribute, naming the nearest ones.
  """
  if name not in MODELS:
    near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.3) or sorted(MODELS)
    raise ValueError(f"model.name: there is no model {name!r}; nearest: {', '.join(near)}.")
  module, attributes = MODELS[name]
  known = set(module.__dataclass_fields__) - {"parent", "name"}
  for key in overrides:
    if key not in known:
      near = difflib.get_close_matches(key, known, n=3, cutoff=0.3) or sorted(known)
      raise ValueError(f"{module.__name__} models have no attribute {key!r}; nearest: {', '.join(near)}.")
  return module(**(attributes | overrides))
