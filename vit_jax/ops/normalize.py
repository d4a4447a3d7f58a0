"""L2 normalisation as the losses and heads use it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def upcast(x: Array) -> Array:
  """x in float32, or wider if it already is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def l2_normalize(x: Float[Array, "... D"], *, eps: float = 1e-12) -> Float[Array, "... D"]:
  """x / max(|x|, eps) along the last axis; the gradient at a zero vector is finite."""
  squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)  # [..., 1]
  norm = jnp.sqrt(jnp.maximum(squares, eps**2))
  return x / norm
