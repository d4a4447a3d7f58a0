"""Tensor names that the repositories of DINOv2 and DINOv3 and timm have in common."""

from __future__ import annotations

from vit_jax.weights.layout import CONVOLUTION, FLAT, LINEAR, Row, dense, linear, norm

# Patch embedding, attention, norms and feed-forward branch with GELU.
TRUNK = (
  *dense("patch_embed", "patch_embed.proj", CONVOLUTION),
  *norm("blocks/norm1", "blocks.{i}.norm1"),
  Row("blocks/attn/qkv/kernel", "blocks.{i}.attn.qkv.weight", LINEAR),
  *dense("blocks/attn/proj", "blocks.{i}.attn.proj", linear(inputs=2)),
  *norm("blocks/norm2", "blocks.{i}.norm2"),
  *dense("blocks/mlp/fc1", "blocks.{i}.mlp.fc1"),
  *dense("blocks/mlp/fc2", "blocks.{i}.mlp.fc2"),
)
QKV_BIAS = (Row("blocks/attn/qkv/bias", "blocks.{i}.attn.qkv.bias", FLAT),)
LAYER_SCALE = tuple(Row(f"blocks/ls{n}/gamma", f"blocks.{{i}}.ls{n}.gamma", FLAT) for n in (1, 2))


def packed_swiglu(together: str, down: str) -> tuple[Row, ...]:
  """The rows of a SwiGLU whose gate and up maps are one tensor, the gate first."""
  kinds = (("kernel", "weight", LINEAR), ("bias", "bias", FLAT))
  pieces = [
    Row(f"blocks/mlp/{ours}/{kind}", f"blocks.{{i}}.mlp.{together}.{theirs}", form, chunk=(index, 2))
    for index, ours in enumerate(("gate", "up"))
    for kind, theirs, form in kinds
  ]
  return (*pieces, *dense("blocks/mlp/down", f"blocks.{{i}}.mlp.{down}"))
