"""Which call of `timm.create_model` makes the counterpart of a model: the nearest name, and arguments for the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

from vit_jax.models import VisionTransformer, create_model
from vit_jax.weights.family import is_distilled

_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
_EVA = {  # timm's names of DINOv3's ViTs: ours; those with query and value biases end in _qkvb
  "vit_small_patch16_dinov3": "dinov3_vits16",
  "vit_small_plus_patch16_dinov3": "dinov3_vits16plus",
  "vit_base_patch16_dinov3": "dinov3_vitb16",
  "vit_large_patch16_dinov3": "dinov3_vitl16",
  "vit_huge_plus_patch16_dinov3": "dinov3_vith16plus",
  "vit_7b_patch16_dinov3": "dinov3_vit7b16",
}
_VIT = {
  "vit_tiny_patch16_224": "vit_ti16",
  "vit_small_patch16_224": "vit_s16",
  "vit_small_patch32_224": "vit_s32",
  "vit_base_patch16_224": "vit_b16",
  "vit_base_patch32_224": "vit_b32",
  "vit_large_patch16_224": "vit_l16",
  "vit_large_patch32_224": "vit_l32",
  "vit_huge_patch14_224": "vit_h14",
  **{f"vit_{name}_patch14_dinov2": f"dinov2_vit{letter}14" for letter, name in _SIZES.items()},
  **{f"vit_{name}_patch14_reg4_dinov2": f"dinov2_vit{letter}14_reg" for letter, name in _SIZES.items()},
}
_DEIT = {
  "deit_tiny_distilled_patch16_224": "deit_ti16_distilled",
  "deit_small_distilled_patch16_224": "deit_s16_distilled",
  "deit_base_distilled_patch16_224": "deit_b16_distilled",
}
_IMPORTS = {  # what the values of arguments that are code need
  "partial": "from functools import partial",
  "LayerNorm": "from timm.layers import LayerNorm",
  "RmsNorm": "from timm.layers import RmsNorm",
  "SwiGLUPacked": "from timm.layers import SwiGLUPacked",
}


class _Code(str):
  """An argument that is written as it is."""

  def __repr__(self) -> str:
    return str(self)


def loading(place: str, model: VisionTransformer) -> list[str]:
  """The lines of Python that load what was saved at `place` (a literal) in timm."""
  model = _as_exported(model)
  if problems := _without_counterpart(model):
    return [f"# timm has no counterpart for {', '.join(problems)}: its features would be others"]
  name, arguments = _nearest(model)
  code = ", ".join(f"{key}={_literal(value)}" for key, value in arguments.items())
  imports = [line for word, line in _IMPORTS.items() if word in code]
  call = f'"{name}", checkpoint_path={place}, num_classes=0' + (f", {code}" if code else "")
  return [*imports, "import timm", f"model = timm.create_model({call})"]


def _nearest(model: VisionTransformer) -> tuple[str, dict[str, Any]]:
  """The name with the fewest arguments besides, and these."""
  if model.rope is not None:
    names, arguments = _EVA, _eva_arguments
  else:
    names, arguments = (_DEIT if is_distilled(model) else _VIT), _vit_arguments
  wanted, found = arguments(model), {}
  for name, ours in names.items():
    base = _as_exported(create_model(ours))
    variants = {name: base}
    if model.rope is not None and base.qkv_bias:
      variants = {f"{name}_qkvb": base, name: base.clone(qkv_bias=False)}
    for variant, with_or_without in variants.items():
      there = arguments(with_or_without)
      different = {key: value for key, value in wanted.items() if there[key] != value}
      if None not in different.values():  # which create_model passes over
        found[variant] = different
  best = min(found, key=lambda name: len(found[name]))
  different = found[best]
  if model.rope is not None and model.pool == "cls":
    different = {"global_pool": "token"} | different  # its own default is the mean
  return best, different


def _as_exported(model: VisionTransformer) -> VisionTransformer:
  """A named model as it is in a file of timm's."""
  table = model.position_table
  if table is not None and table.prefix == "cls" and model.num_registers:
    return model.clone(position_table=dataclasses.replace(table, prefix="none"))
  return model


def _eva_arguments(model: VisionTransformer) -> dict[str, Any]:
  hidden = model.mlp_hidden or 4 * model.width
  return _sizes(model, hidden) | dict(
    qkv_bias=model.qkv_bias,
    num_reg_tokens=model.num_registers,
    swiglu_mlp=model.mlp == "swiglu",
    swiglu_align_to=0 if model.mlp == "swiglu" and hidden % 8 else 8,
    rope_temperature=model.rope.base,
    use_fc_norm=model.pool_norm,
    global_pool={"cls": "token"}.get(model.pool, model.pool),
  )


def _vit_arguments(model: VisionTransformer) -> dict[str, Any]:
  table, gated = model.position_table, model.mlp == "swiglu"
  hidden = (model.mlp_hidden or 4 * model.width) * (2 if gated else 1)  # both maps of a gated one are one
  before = int(model.class_token) + model.num_registers
  height, width = (side * model.patch_size for side in table.grid)
  return _sizes(model, hidden) | dict(
    img_size=height if height == width else (height, width),
    reg_tokens=0 if is_distilled(model) else model.num_registers,
    no_embed_class=bool(before) and table.prefix == "none",
    qkv_bias=model.qkv_bias,
    proj_bias=model.proj_bias,
    qk_norm=model.qk_norm,
    pre_norm=model.pre_norm,
    global_pool={"cls": "token", "distilled": "token"}.get(model.pool, model.pool),
    fc_norm=None if model.pool_norm == (model.pool == "avg") else model.pool_norm,  # None: as the pooling has it
    mlp_layer=_Code("SwiGLUPacked") if gated else None,
    act_layer={"swiglu": "silu", "gelu_tanh": "gelu_tanh"}.get(model.mlp),
  )


def _sizes(model: VisionTransformer, hidden: int) -> dict[str, Any]:
  norm = {"layernorm": "LayerNorm", "rmsnorm": "RmsNorm"}[model.norm]
  ratio = hidden / model.width
  ratio = ratio if int(model.width * ratio) == hidden else (hidden + 0.5) / model.width  # which is rounded down
  return dict(
    in_chans=model.in_channels,
    patch_size=model.patch_size,
    embed_dim=model.width,
    depth=model.depth,
    num_heads=model.num_heads,
    mlp_ratio=int(ratio) if ratio == int(ratio) else ratio,
    class_token=model.class_token,
    init_values=0 if model.layer_scale is None else 1e-5,  # what it is at the start, which the file replaces
    norm_layer=_Code(f"partial({norm}, eps={model.norm_eps})"),
  )


def _without_counterpart(model: VisionTransformer) -> list[str]:
  """The attributes that no argument of timm expresses."""
  found = []
  if model.rope is None and model.position_table is None or model.rope is not None and model.position_table is not None:
    found.append(f"rope={model.rope} with position_table={model.position_table}")
    return found
  if model.rope is not None:
    plain = dict(proj_bias=True, mlp_bias=True, qk_norm=False, pre_norm=False, patch_bias=True)
    if model.rope.base is None or model.rope.normalize != "separate":
      found.append(f"rope={model.rope}")
    if model.layer_scale is None:
      found.append("layer_scale=None beside rotary positions (timm.create_model does not turn it off)")
    if model.mlp == "gelu_tanh":
      found.append("mlp='gelu_tanh'")
    if model.qkv_bias and not model.mask_k_bias:
      found.append("a key bias that has an effect")
  else:
    plain = dict(mlp_bias=model.proj_bias, patch_bias=not model.pre_norm)
    table = model.position_table
    if table.kind != "learned" or table.prefix == "cls" and model.num_registers:
      found.append(f"position_table={table}")
  plain |= dict(separate_cls_norm=False)
  return found + [f"{key}={getattr(model, key)!r}" for key, value in plain.items() if getattr(model, key) != value]


def _literal(value: Any) -> str:
  return repr(value).replace("'", '"')
