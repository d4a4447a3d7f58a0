"""Layout "dinov2": the tensor names of the DINOv2 repository's backbones (hub files)."""

from __future__ import annotations

from typing import Any

from vit_jax.models import VisionTransformer
from vit_jax.weights.layout import Layout, Row, norm, token
from vit_jax.weights.trunk import LAYER_SCALE, QKV_BIAS, TRUNK, packed_swiglu

_ROWS = (
  Row("cls_token", "cls_token", token(2)),
  Row("positions", "pos_embed", token(1)),
  Row("registers", "register_tokens", token(1)),
  Row("mask_token", "mask_token", token(1)),
  *TRUNK,
  *QKV_BIAS,
  *LAYER_SCALE,
  *packed_swiglu("w12", "w3"),
  *norm("final_norm", "norm"),
)


def resizing(num_registers: int) -> dict[str, Any]:
  """How the repository resizes positions: the attributes of a `PositionTable`."""
  return dict(antialias=True, offset=0.0) if num_registers else dict(antialias=False, offset=0.1)


def _rows(model: Any) -> tuple[Row, ...]:
  return _ROWS


DINOV2 = Layout(
  _rows, (VisionTransformer,), hint='the DINOv2 repository has no such tensor: keep it with format="orbax"'
)
