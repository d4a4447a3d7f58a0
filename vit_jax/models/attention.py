"""Multi-head self-attention with rotary positions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.layers import INIT_STD, Linear, make_norm
from vit_jax.ops import rope
from vit_jax.ops.attention import attention


class MaskedKeyBias(Linear):
  """The fused q/k/v map whose key bias has no effect and gets no gradient (it keeps its place in the parameters)."""

  def adjust_bias(self, bias: Float[Array, "3 H d"]) -> Float[Array, "3 H d"]:
    # A select, not a product: whatever a file holds in the key third, even NaN, must not reach the output.
    return jnp.where(jnp.array([True, False, True])[:, None, None], bias, 0.0)


class SelfAttention(nn.Module):
  """q, k, v from one linear map, rotary positions on the patch tokens of q and k, softmax attention, output map.

  With `qk_norm`, queries and keys are normalised per head first (Dehghani et al. 2023), by a norm of the kind given.
  With `recompute`, the backward pass computes the attention weights once more instead of keeping them.
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
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], tables: tuple[Float[Array, "N d"], Float[Array, "N d"]] | None
  ) -> Float[Array, "B T D"]:
    width = x.shape[-1]
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    qkv_map = MaskedKeyBias if self.mask_k_bias else Linear
    shape = (3, self.num_heads, width // self.num_heads)
    qkv = qkv_map(shape, use_bias=self.qkv_bias, name="qkv", init_std=self.init_std, **types)(x)  # [B, T, 3, H, d]
    q, k, v = (nn.with_logical_constraint(qkv[:, :, i], ("batch", None, "heads", None)) for i in range(3))
    if self.qk_norm:
      norm = {"eps": self.norm_eps, **types}
      q, k = (make_norm(self.norm_kind, name=name, **norm)(y) for name, y in (("q_norm", q), ("k_norm", k)))
    if tables is not None:
      q, k = rope.rotate(q, *tables), rope.rotate(k, *tables)
    y = attention(q, k, v, recompute=self.recompute)  # [B, T, H, d]
    project = Linear((width,), contract=2, use_bias=self.proj_bias, name="proj", init_std=self.init_std, **types)
    return project(y)
