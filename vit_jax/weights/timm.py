"""Layout "timm": the tensor names of timm's VisionTransformer, and of its Eva, which holds the DINOv3 ViTs."""

from __future__ import annotations

from vit_jax.models import VisionTransformer
from vit_jax.weights import family
from vit_jax.weights.layout import FLAT, Layout, Row, dense, linear, norm, token
from vit_jax.weights.trunk import LAYER_SCALE, QKV_BIAS, TRUNK, packed_swiglu

RESIZING = dict(antialias=True, offset=0.0)  # of positions, as attributes of a `PositionTable`

_TOKENS = (
  Row("cls_token", "cls_token", token(2)),
  Row("positions", "pos_embed", token(1)),
)

_VIT = (
  *QKV_BIAS,
  *LAYER_SCALE,
  *norm("norm_pre", "norm_pre"),
  *norm("blocks/attn/q_norm", "blocks.{i}.attn.q_norm"),
  *norm("blocks/attn/k_norm", "blocks.{i}.attn.k_norm"),
  *packed_swiglu("fc1", "fc2"),
  Row("attn_pool/probe", "attn_pool.latent", token(2)),
  *dense("attn_pool/q", "attn_pool.q"),
  *dense("attn_pool/kv", "attn_pool.kv"),
  *dense("attn_pool/proj", "attn_pool.proj", linear(inputs=2)),
  *norm("attn_pool/norm", "attn_pool.norm"),
  *dense("attn_pool/mlp/fc1", "attn_pool.mlp.fc1"),
  *dense("attn_pool/mlp/fc2", "attn_pool.mlp.fc2"),
)

_EVA = (
  *(Row(f"blocks/ls{n}/gamma", f"blocks.{{i}}.gamma_{n}", FLAT) for n in (1, 2)),
  *dense("blocks/mlp/gate", "blocks.{i}.mlp.fc1_g"),
  *dense("blocks/mlp/up", "blocks.{i}.mlp.fc1_x"),
  *dense("blocks/mlp/down", "blocks.{i}.mlp.fc2"),
)
_EVA_BIAS = tuple(
  Row("blocks/attn/qkv/bias", f"blocks.{{i}}.attn.{letter}_bias", FLAT, part=(0, index))
  for index, letter in ((0, "q"), (2, "v"))
)


def _rows(model: VisionTransformer) -> tuple[Row, ...]:
  final = norm("final_norm", "fc_norm" if model.pool_norm else "norm")
  if model.rope is None:
    # Here the key bias counts, so one that has no effect has no place.
    rows = tuple(row for row in _VIT if not (model.mask_k_bias and row in QKV_BIAS))
  else:
    rows = _EVA + (_EVA_BIAS if model.mask_k_bias else ())
  registers = Row("registers", "dist_token" if family.is_distilled(model) else "reg_token", token(1))
  return (*_TOKENS, registers, *TRUNK, *rows, *final)


TIMM = Layout(
  _rows,
  (VisionTransformer,),
  outside=("head.", "head_dist."),  # classifiers
  hint='timm has no such tensor: keep it with format="orbax"',
)
