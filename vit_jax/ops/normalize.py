"""Normalisation in float32: of layers, whose gradient keeps no more than their input, and L2 of losses and heads."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
  x: Float[Array, "... D"], scale: Float[Array, " D"], bias: Float[Array, " D"] | None, eps: float, dtype: Any
) -> Float[Array, "... D"]:
  """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, computed in float32 at least, as `dtype`.

  Without `bias` the mean stays where it is: x / sqrt(mean(x^2) + eps) * scale, RMSNorm (Zhang and Sennrich 2019).
  The gradient is computed in float32, too, from x as it came; automatic differentiation would keep three more arrays of
  its size, in float32.

  Raises:
    ValueError: if scale and bias are not of the last axis.
  """
  return _layer_norm(x, scale, bias, eps, dtype)[0]


def _layer_norm(x: Array, scale: Array, bias: Array | None, eps: float, dtype: Any) -> tuple[Array, tuple]:
  words = f"layer_norm takes tokens [..., D], got {x.shape}, with scale and bias [D]"
  parameters = [scale] if bias is None else [scale, bias]
  chex.assert_shape(parameters, x.shape[-1:], custom_message=words, exception_type=ValueError)
  y, mean = upcast(x), None
  if bias is not None:
    mean = jnp.mean(y, axis=-1, keepdims=True)  # [..., 1]
    y = y - mean
  rate = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)  # [..., 1]
  y = y * rate * scale
  return (y if bias is None else y + bias).astype(dtype), (x, scale, bias, mean, rate)


def _layer_norm_gradient(eps: float, dtype: Any, kept: tuple, gradient: Array) -> tuple[Array, Array, Array | None]:
  x, scale, bias, mean, rate = kept
  unit = (upcast(x) if bias is None else upcast(x) - mean) * rate  # [..., D]
  gradient = upcast(gradient)
  by_unit = gradient * scale
  slope = by_unit - unit * jnp.mean(by_unit * unit, axis=-1, keepdims=True)
  if bias is not None:
    slope -= jnp.mean(by_unit, axis=-1, keepdims=True)
  tokens = tuple(range(x.ndim - 1))
  by_scale = jnp.sum(gradient * unit, axis=tokens).astype(scale.dtype)
  by_bias = None if bias is None else jnp.sum(gradient, axis=tokens).astype(bias.dtype)
  return (slope * rate).astype(x.dtype), by_scale, by_bias


layer_norm.defvjp(_layer_norm, _layer_norm_gradient)
