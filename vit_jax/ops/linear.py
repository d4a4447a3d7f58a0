"""The product of a linear map, with a gradient whose products a CPU is fast at."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(x: Float[Array, "... K"], kernel: Float[Array, "K N"], *, contract: int = 1) -> Float[Array, "... N"]:
  """x W over the last `contract` axes of x and the first of W, in their type; K and N may be several axes.

  On a CPU the gradient is spelled out (`_pull`); elsewhere it is left to automatic differentiation.
  """
  return _on_cpu(x, kernel, contract) if platform() == "cpu" else _product(x, kernel, contract)


def platform() -> str:
  """What the program in hand is for: the platform of its mesh, which may be of described devices, or this machine's."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def _product(x: Array, kernel: Array, contract: int) -> Array:
  axes = (tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract)))
  return jax.lax.dot_general(x, kernel, (axes, ((), ())))


_on_cpu = functools.partial(jax.custom_vjp, nondiff_argnums=(2,))(_product)


def _keep(x: Array, kernel: Array, contract: int) -> tuple[Array, tuple[Array, Array]]:
  return _product(x, kernel, contract), (x, kernel)


def _pull(contract: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
  """The gradients of x and W.

  Automatic differentiation writes that of W as a transposed product [N, K], and XLA then transposes the gradient of
  the tokens in memory to undo it. Here its rows are the shorter of K and N, and only a result [N, K] is transposed.
  """
  x, kernel = kept
  lead = x.ndim - contract
  outputs = (tuple(range(lead, gradient.ndim)), tuple(range(contract, kernel.ndim)))
  by_x = jax.lax.dot_general(gradient, kernel, (outputs, ((), ())))
  rows = ((tuple(range(lead)),) * 2, ((), ()))
  if math.prod(kernel.shape[:contract]) <= math.prod(kernel.shape[contract:]):
    return by_x, jax.lax.dot_general(x, gradient, rows)
  # Without the barrier XLA would merge the transposition into the product, and be where it was.
  by_kernel = jax.lax.optimization_barrier(jax.lax.dot_general(gradient, x, rows))  # [N, K]
  inner = tuple(range(-contract, 0))
  return by_x, jnp.moveaxis(by_kernel, inner, tuple(range(contract)))


_on_cpu.defvjp(_keep, _pull)
