"""How what was saved is loaded: in vit_jax, and in the library that the format is for, as Python that can be run."""

from __future__ import annotations

import json
import os
from typing import Any

from vit_jax.hub import timm_models
from vit_jax.hub.opening import Backbone
from vit_jax.models import MODELS, ConvNeXt, create_model
from vit_jax.weights.family import is_distilled

# What a DINOv2 or DINOv3 hub function builds whatever the values of these are.
_FREE = ("parent", "name", "init_std", "drop_path", "dtype", "param_dtype", "quantization", "remat", "unroll")
_FREE += ("layer_scale", "rope", "position_table", "norm_eps", "masking")


def how_to_load(path: str | os.PathLike, model: Backbone, format: str, *, images: bool = True) -> str:
  """A few lines of Python for each library that opens what `save_model` wrote at `path`.

  Args:
    path: as it was given to `save_model`.
    model: the module that was saved.
    format: in which.
    images: whether it was saved with what is said of its images.
  """
  place = json.dumps(os.fspath(path), ensure_ascii=False)  # a Python literal, too
  parts = {"vit_jax": ["import vit_jax", f"model, params = vit_jax.load_model({place})"]}
  if images:
    parts["vit_jax"].append(f'images = vit_jax.load_images(["photo.jpg"], like={place})')
  if format == "safetensors":
    parts["transformers"] = _transformers(place, model, images)
  elif format == "timm":
    parts["timm"] = timm_models.loading(place, model)
  elif format == "pth":
    parts["PyTorch"] = _pytorch(place, model)
  return "\n".join(f"# {name}\n" + "\n".join(lines) for name, lines in parts.items())


def _transformers(place: str, model: Backbone, images: bool) -> list[str]:
  plain = not isinstance(model, ConvNeXt) and model.position_table is not None and model.layer_scale is None
  options = ", add_pooling_layer=False" if plain else ""  # the pooler of a ViT is no part of what is saved
  if not images:
    return ["from transformers import AutoModel", f"model = AutoModel.from_pretrained({place}{options})"]
  return [
    "from transformers import AutoImageProcessor, AutoModel",
    f"model = AutoModel.from_pretrained({place}{options})",
    f"processor = AutoImageProcessor.from_pretrained({place})",
  ]


def _pytorch(place: str, model: Backbone) -> list[str]:
  """By the functions of the repositories for torch.hub, or else by their class."""
  isolated = isinstance(model, ConvNeXt) or model.position_table is None
  name = _published(model, "dinov3_" if isolated else "dinov2_")
  lines = ["import torch"]
  loading = f'model.load_state_dict(torch.load({place}, map_location="cpu"))'
  if not isolated:
    if name is None:
      return [f"# the DINOv2 repository's DinoVisionTransformer has {place}'s tensors, but no function makes this size"]
    return [*lines, f'model = torch.hub.load("facebookresearch/dinov2", "{name}", pretrained=False)', loading]
  lines += ['REPO = "dinov3"  # a clone of github.com/facebookresearch/dinov3']
  if name == "dinov3_vitl16" or isinstance(model, ConvNeXt) and name:  # whose weights= takes published names alone
    return [*lines, f'model = torch.hub.load(REPO, "{name}", source="local", pretrained=False)', loading]
  if name:
    return [*lines, f'model = torch.hub.load(REPO, "{name}", source="local", weights={place})']
  if isinstance(model, ConvNeXt):
    kind, arguments = "convnext import ConvNeXt", dict(
      in_chans=model.in_channels, depths=list(model.depths), dims=list(model.widths)
    )  # fmt: skip
  else:
    kind, arguments = "vision_transformer import DinoVisionTransformer", _dinov3_arguments(model)
  if arguments is None:
    return ["# the DINOv3 repository has no counterpart for its norm"]
  call = ", ".join(f"{key}={value!r}" for key, value in arguments.items()).replace("'", '"')
  module, _, cls = kind.partition(" import ")
  return [
    *lines,
    "import sys",
    "sys.path.insert(0, REPO)",
    f"from dinov3.models.{module} import {cls}",
    f"model = {cls}({call})",
    loading,
  ]


def _dinov3_arguments(model: Any) -> dict[str, Any] | None:
  """The arguments of the DINOv3 repository's class; None: it has none for the model's norm."""
  norm = {("layernorm", 1e-6): "layernorm", ("layernorm", 1e-5): "layernormbf16", ("rmsnorm", 1e-5): "rmsnorm"}
  if (model.norm, model.norm_eps) not in norm or model.rope is None:
    return None
  hidden, gated = model.mlp_hidden or 4 * model.width, model.mlp == "swiglu"
  rope = {
    f"pos_embed_rope_{theirs}": getattr(model.rope, ours)
    for ours, theirs in (("base", "base"), ("min_period", "min_period"), ("max_period", "max_period"),
                         ("normalize", "normalize_coords"))
  }  # fmt: skip
  return dict(
    patch_size=model.patch_size,
    in_chans=model.in_channels,
    embed_dim=model.width,
    depth=model.depth,
    num_heads=model.num_heads,
    ffn_ratio=hidden * (1.5 if gated else 1.0) / model.width,  # a gated one has two thirds of it
    ffn_layer="swiglu" if gated else "mlp",
    qkv_bias=model.qkv_bias,
    proj_bias=model.proj_bias,
    ffn_bias=model.mlp_bias,
    layerscale_init=model.layer_scale,
    norm_layer=norm[model.norm, model.norm_eps],
    n_storage_tokens=model.num_registers,
    mask_k_bias=model.mask_k_bias,
    untie_cls_and_patch_norms=model.separate_cls_norm,
    untie_global_and_local_cls_norm=model.separate_local_cls_norm,
    **rope,
    pos_embed_rope_dtype="fp32",
  )


def _published(model: Backbone, prefix: str) -> str | None:
  """The name under which the repository has a model of these attributes."""
  wanted = _attributes(model)
  names = [name for name in MODELS if name.startswith(prefix) and not name.endswith("_sat")]
  return next((name for name in names if _attributes(create_model(name)) == wanted), None)


def _attributes(model: Backbone) -> dict[str, Any]:
  names = [name for name in type(model).__dataclass_fields__ if name not in _FREE]
  values = {name: getattr(model, name) for name in names} | {"kind": type(model)}
  if isinstance(model, ConvNeXt):
    return values
  rope = model.rope and (model.rope.base, model.rope.min_period, model.rope.max_period, model.rope.normalize)
  table = model.position_table
  return values | {
    "mlp_hidden": model.mlp_hidden or 4 * model.width,
    "layer_scale": model.layer_scale is not None,
    "mask_k_bias": model.mask_k_bias and model.qkv_bias,
    "rope": rope,
    "norm_eps": model.norm_eps,
    "table": table and (table.kind, table.grid, table.prefix),
    "distilled": is_distilled(model),
  }
