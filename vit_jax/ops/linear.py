"""The product of a linear map, with a gradient whose products a CPU is fast at."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.platform import platform


def joined(kernel: Array, inputs: int) -> Array:
  """A kernel with its `inputs` leading axes as one; on a TPU also the last two of the others: [K, ..., N].

  Heads and their channels would be laid out there, and padded, as two axes. Elsewhere that gains nothing, and on a GPU
  it makes the addition of a bias a pass of its own.
  """
  outputs = kernel.shape[inputs:]
  if len(outputs) > 1 and platform() == "tpu":
    outputs = (*outputs[:-2], outputs[-2] * outputs[-1])
  return kernel.reshape(math.prod(kernel.shape[:inputs]), *outputs)


@jax.custom_vjp
def linear(x: Float[Array, "... K"], kernel: Float[Array, "K N"]) -> Float[Array, "... N"]:
  """x W, in their type; N may be several axes.

  A recomputation policy that looks for matrix products does not see this one: its result wants a name
  (`models/remat.py`).
  """
  return product(x, kernel)


def product(x: Float[Array, "... K"], kernel: Float[Array, "K N"]) -> Float[Array, "... N"]:
  """As `linear`, for automatic differentiation."""
  return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def kernel_gradient(
  x: Float[Array, "... K"], gradient: Float[Array, "... N"], kernel: Float[Array, "K N"]
) -> Float[Array, "K N"]:
  """The gradient of W, given that of x W; of `kernel` only shape and type count.

  Automatic differentiation writes it as a transposed product [N, K], and on a CPU XLA then transposes the gradient of
  the tokens in memory to undo that. There, the rows of the product are the shorter of K and N, and only a result [N, K]
  is transposed. Of one map of ViT-S/16 with both its gradients, on one core (AMD EPYC), that takes 0.7 to 0.97 of the
  time.
  """
  if platform() != "cpu":
    return jax.linear_transpose(lambda kernel: product(x, kernel), kernel)(gradient)[0]
  leading = tuple(range(x.ndim - 1))
  rows = ((leading, leading), ((), ()))
  if kernel.shape[0] <= math.prod(kernel.shape[1:]):
    return jax.lax.dot_general(x, gradient, rows)
  # Without the barrier XLA would merge the transposition into the product, and be where it was.
  transposed = jax.lax.optimization_barrier(jax.lax.dot_general(gradient, x, rows))  # [N, K]
  return jnp.moveaxis(transposed, -1, 0)


def _keep(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
  return product(x, kernel), (x, kernel)


def _pull(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  x, kernel = kept
  (by_x,) = jax.linear_transpose(lambda y: product(y, kernel), x)(gradient)
  return by_x, kernel_gradient(x, gradient, kernel)


linear.defvjp(_keep, _pull)
