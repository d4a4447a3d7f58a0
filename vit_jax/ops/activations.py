"""Activation functions whose gradient keeps little."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.normalize import upcast


@jax.custom_vjp
def gelu(x: Float[Array, " ..."]) -> Float[Array, " ..."]:
  """The exact GELU, x Phi(x) with Phi(x) = (1 + erf(x / sqrt 2)) / 2; in float32 at least, returned in x's type.

  Differs from `jax.nn.gelu(approximate=False)` in two ways. It is made of erf and not of erfc, a third of the time on
  a CPU; the difference is below 1e-6 where x < -3 makes erfc the more exact. And the backward pass keeps x alone, where
  automatic differentiation keeps three arrays of the widest activation of a block.
  """
  wide = upcast(x)
  return (wide * _normal_cdf(wide)).astype(x.dtype)


def _keep_input(x: Array) -> tuple[Array, Array]:
  return gelu(x), x


def _slope(x: Array, gradient: Array) -> tuple[Array]:
  wide = upcast(x)
  density = jnp.exp(-0.5 * jnp.square(wide)) * (1.0 / math.sqrt(2.0 * math.pi))
  return ((upcast(gradient) * (_normal_cdf(wide) + wide * density)).astype(x.dtype),)


def _normal_cdf(x: Array) -> Array:
  return 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


gelu.defvjp(_keep_input, _slope)
