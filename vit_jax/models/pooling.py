"""From tokens to the feature of the whole image."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.layers import Linear, linear_init, make_norm, spread
from vit_jax.models.mlp import MLPS
from vit_jax.ops.attention import attention
from vit_jax.ops.normalize import upcast

POOLS = ("cls", "avg", "map", "distilled")


class AttentionPool(nn.Module):
  """One learned query attends to all tokens, then a feed-forward branch (MAP; Zhai et al. 2022, section 2.1)."""

  num_heads: int
  mlp_kind: str
  mlp_hidden: int
  norm_kind: str
  norm_eps: float
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B D"]:
    batch, _, width = tokens.shape
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    heads = (self.num_heads, width // self.num_heads)
    probe = self.param("probe", linear_init, (width,), self.param_dtype)
    query = Linear(heads, name="q", **types)(spread(probe, (batch, 1, width), tokens.dtype))
    key_value = Linear((2, *heads), name="kv", **types)(tokens)  # [B, T, 2, H, d]
    y = attention(query, key_value[:, :, 0], key_value[:, :, 1]).reshape(batch, 1, width)
    y = Linear((width,), inputs=heads, name="proj", **types)(y)  # [B, 1, D]
    norm = make_norm(self.norm_kind, eps=self.norm_eps, name="norm", **types)
    (more,) = MLPS[self.mlp_kind](self.mlp_hidden, name="mlp", **types)((norm(y),))
    return (y + more)[:, 0]


def average(patches: Float[Array, "B N D"]) -> Float[Array, "B D"]:
  """The mean of the patches, summed in float32 at least."""
  return jnp.mean(upcast(patches), axis=1).astype(patches.dtype)
