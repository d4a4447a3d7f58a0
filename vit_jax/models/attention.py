"""Multi-head self-attention with rotary positions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.layers import INIT_STD, Linear, make_norm
from vit_jax.ops.attention import self_attention
from vit_jax.ops.fused_attention import Tables


class MaskedKeyBias(Linear):
  """The fused q/k/v map whose key bias has no effect and gets no gradient (it keeps its place in the parameters)."""

  def adjust_bias(self, bias: Float[Array, "3 H d"]) -> Float[Array, "3 H d"]:
    # A select, not a product: whatever a file holds in the key third, even NaN, must not reach the output.
    return jnp.where(jnp.array([True, False, True])[:, None, None], bias, 0.0)


class SelfAttention(nn.Module):
  """q, k, v from one linear map, rotary positions on the patch tokens of q and k, softmax attention, output map.

  For several token arrays at once, each with its own positions (or none).
  With `qk_norm`, queries and keys are normalised per head first (Dehghani et al. 2023), by a norm of the kind given.
  With `recompute`, the backward pass computes the attention weights once more instead of keeping them.
  With `quantization`, both maps are of 8 bits (`products`); attention itself is not.
  """

  num_heads: int
  qkv_bias: bool = True
  proj_bias: bool = True
  mask_k_bias: bool = False
  qk_norm: bool = False
  norm_kind: str = "layernorm"
  norm_eps: float = 1e-6
  init_std: float = INIT_STD
  recompute: bool = False
  quantization: str | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, xs: tuple[Float[Array, "B T D"], ...], tables: tuple[Tables | None, ...]) -> tuple[Array, ...]:
    width = xs[0].shape[-1]
    types = {name: getattr(self, name) for name in ("init_std", "quantization", "dtype", "param_dtype")}
    shape, axes = (3, self.num_heads, width // self.num_heads), (None, None, "heads", None)
    qkv_map = MaskedKeyBias if self.mask_k_bias else Linear
    qkv_map = qkv_map(shape, use_bias=self.qkv_bias, name="qkv", kernel_axes=axes, **types)
    norms = None
    if self.qk_norm:
      norm = {"eps": self.norm_eps, "dtype": self.dtype, "param_dtype": self.param_dtype}
      norms = [make_norm(self.norm_kind, name=name, **norm) for name in ("q_norm", "k_norm")]

    def attend(qkv: Float[Array, "B T 3 H d"], tables: Tables | None) -> Float[Array, "B T D"]:
      logical = ("batch", None, None, "heads", None)
      qkv = nn.with_logical_constraint(qkv, logical)
      if norms is not None:
        q, k = (norm(qkv[:, :, i]) for i, norm in enumerate(norms))
        qkv = jnp.stack([q, k, qkv[:, :, 2]], axis=2)
      y = self_attention(qkv, tables, spec=nn.logical_to_mesh_axes(logical), recompute=self.recompute)
      return y.reshape(*y.shape[:2], width)

    ys = tuple(attend(qkv, own) for qkv, own in zip(qkv_map(xs), tables, strict=True))
    proj = {"inputs": shape[1:], "use_bias": self.proj_bias, "kernel_axes": ("heads", None, None)}
    return Linear((width,), name="proj", **proj, **types)(ys)
