"""The product of a linear map, with a gradient whose products a CPU is fast at."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.platform import platform


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: Float[Array, "... K"], kernel: Float[Array, "K N"], contract: int = 1) -> Float[Array, "... N"]:
  """x W over the last `contract` axes of x and the first of W, in their type; K and N may be several axes.

  A recomputation policy that looks for matrix products does not see this one: its result wants a name
  (`models/remat.py`).
  """
  return product(x, kernel, contract)


def product(x: Float[Array, "... K"], kernel: Float[Array, "K N"], contract: int) -> Float[Array, "... N"]:
  """As `linear`, for automatic differentiation."""
  axes = (tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract)))
  return jax.lax.dot_general(x, kernel, (axes, ((), ())))


def kernel_gradient(
  x: Float[Array, "... K"], gradient: Float[Array, "... N"], kernel: Float[Array, "K N"], contract: int
) -> Float[Array, "K N"]:
  """The gradient of W, given that of x W; of `kernel` only shape and type count.

  Automatic differentiation writes it as a transposed product [N, K], and on a CPU XLA then transposes the gradient of
  the tokens in memory to undo that. There, the rows of the product are the shorter of K and N, and only a result [N, K]
  is transposed. Of one map of ViT-S/16 with both its gradients, on one core (AMD EPYC), that takes 0.7 to 0.97 of the
  time.
  """
  if platform() != "cpu":
    return jax.linear_transpose(lambda kernel: product(x, kernel, contract), kernel)(gradient)[0]
  leading = tuple(range(x.ndim - contract))
  rows = ((leading, leading), ((), ()))
  if math.prod(kernel.shape[:contract]) <= math.prod(kernel.shape[contract:]):
    return jax.lax.dot_general(x, gradient, rows)
  # Without the barrier XLA would merge the transposition into the product, and be where it was.
  transposed = jax.lax.optimization_barrier(jax.lax.dot_general(gradient, x, rows))  # [N, K]
  return jnp.moveaxis(transposed, tuple(range(-contract, 0)), tuple(range(contract)))


def _keep(x: Array, kernel: Array, contract: int) -> tuple[Array, tuple[Array, Array]]:
  return product(x, kernel, contract), (x, kernel)


def _pull(contract: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  x, kernel = kept
  (by_x,) = jax.linear_transpose(lambda y: product(y, kernel, contract), x)(gradient)
  return by_x, kernel_gradient(x, gradient, kernel, contract)


linear.defvjp(_keep, _pull)
