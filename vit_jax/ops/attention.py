"""Scaled dot-product attention, dispatched to the fastest exact implementation of the backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention(
  query: Float[Array, "B T H d"],
  key: Float[Array, "B T H d"],
  value: Float[Array, "B T H d"],
  *,
  recompute: bool = False,
) -> Float[Array, "B T H d"]:
  """softmax(q k^T / sqrt(d)) v without mask or dropout; the softmax in float32 (float64 for float64 inputs).

  On GPU with 16-bit inputs this is cuDNN's flash attention; elsewhere the two matmuls are spelled out for XLA.

  Args:
    recompute: the backward pass computes the weights [B, H, T, T] once more instead of keeping them; flash attention
      always does.
  """
  if jax.default_backend() == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16):
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
  return (jax.checkpoint(_spelled_out, prevent_cse=False) if recompute else _spelled_out)(query, key, value)


def _spelled_out(query: Array, key: Array, value: Array) -> Array:
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scale = query.shape[-1] ** -0.5
  logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide) * scale  # [B, H, T, T]
  weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, value)  # [B, T, H, d]
