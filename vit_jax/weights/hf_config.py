"""Between a `VisionTransformer` and the `config.json` of a Hugging Face DINOv3 ViT (model_type "dinov3_vit")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vit_jax.models import Rope, VisionTransformer
from vit_jax.weights import family
from vit_jax.weights.errors import WeightsError

MODEL_TYPE = "dinov3_vit"

_SAME = family.SAME | {  # ours: theirs
  "mlp_hidden": "intermediate_size",
  "num_registers": "num_register_tokens",
  "proj_bias": "proj_bias",
  "mlp_bias": "mlp_bias",
  "layer_scale": "layerscale_value",
}
_SAME_ROPE = {
  "base": "rope_theta",
  "shift": "pos_embed_shift",
  "jitter": "pos_embed_jitter",
  "rescale": "pos_embed_rescale",
}
_DEFAULTS = {  # of transformers, for keys that a config.json may leave out
  "patch_size": 16,
  "num_channels": 3,
  "hidden_size": 384,
  "num_hidden_layers": 12,
  "num_attention_heads": 6,
  "intermediate_size": 1536,
  "num_register_tokens": 0,
  "proj_bias": True,
  "mlp_bias": True,
  "layer_norm_eps": 1e-5,
  "layerscale_value": 1.0,
  "rope_theta": 100.0,
  "pos_embed_shift": None,
  "pos_embed_jitter": None,
  "pos_embed_rescale": 2.0,
  "query_bias": True,
  "key_bias": False,
  "value_bias": True,
  "use_gated_mlp": False,
  "hidden_act": "gelu",
}


def to_config(model: VisionTransformer, image_size: int) -> dict[str, Any]:
  """The config.json of a model.

  Raises:
    WeightsError: if Hugging Face's DINOv3 ViT cannot express the model; names every attribute that is in the way.
  """
  family.refuse("DINOv3 ViT", _inexpressible(model))
  gated = model.mlp == "swiglu"
  return family.make_config(
    model,
    MODEL_TYPE,
    "DINOv3ViTModel",
    _SAME,
    intermediate_size=model.mlp_hidden or 4 * model.width,
    **{theirs: getattr(model.rope, ours) for ours, theirs in _SAME_ROPE.items()},
    query_bias=model.qkv_bias,
    key_bias=model.qkv_bias and not model.mask_k_bias,
    value_bias=model.qkv_bias,
    use_gated_mlp=gated,
    hidden_act="silu" if gated else "gelu",
    image_size=image_size,
  )


def to_attributes(config: Mapping[str, Any]) -> dict[str, Any]:
  """The attributes of the `VisionTransformer` that a config.json describes.

  Raises:
    WeightsError: for settings that no `VisionTransformer` has; names them.
  """
  c = _DEFAULTS | dict(config)
  problems = []
  if c["query_bias"] != c["value_bias"]:
    problems.append(f"query_bias={c['query_bias']} with value_bias={c['value_bias']}")
  if c["key_bias"] and not c["query_bias"]:
    problems.append("key_bias without query_bias")
  act = "silu" if c["use_gated_mlp"] else "gelu"
  if c["hidden_act"] != act:
    problems.append(f"hidden_act={c['hidden_act']!r} instead of {act!r}")
  if not isinstance(c["patch_size"], int):
    problems.append(f"patch_size={c['patch_size']}")
  if problems:
    raise WeightsError(f"VisionTransformer has no counterpart for {'; '.join(problems)}.")
  return dict(
    **family.same_attributes(c, _SAME),
    rope=Rope(**{ours: c[theirs] for ours, theirs in _SAME_ROPE.items()}),
    qkv_bias=c["query_bias"],
    mask_k_bias=not c["key_bias"],
    mlp="swiglu" if c["use_gated_mlp"] else "gelu",
  )


def _inexpressible(model: VisionTransformer) -> list[str]:
  plain, found = Rope(), family.deviations(model, family.PLAIN | {"position_table": None})
  if model.layer_scale is None:
    found.append("layer_scale=None (its blocks always have one)")
  if model.mlp not in ("gelu", "swiglu"):
    found.append(f"mlp={model.mlp!r}")
  if model.rope is None:
    return [*found, "rope=None"]
  if model.rope.base is None:
    found.append("rope.min_period and rope.max_period (only rope.base)")
  if model.rope.normalize != plain.normalize:
    found.append(f"rope.normalize={model.rope.normalize!r} (only {plain.normalize!r})")
  return found
