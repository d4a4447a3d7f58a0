"""Products of several inputs with one weight that is spread over devices: gathered once, its gradient reduced once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vit_jax.ops.normalize import upcast


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def products(
  xs: tuple[Array, ...], kernel: Array, contract: int, axes: tuple[str | None, ...], dtype: Any
) -> tuple[Array, ...]:
  """x W for every x, over the last `contract` axes of x.

  The weight is cast before it is gathered, and gathered once for all inputs: in the forward pass, and again in the
  backward pass, which keeps no more of it than the part that a device has. Its gradient, of the rows of one device in
  `dtype`, is summed in float32, over the inputs first, so that devices exchange one sum. The reference trains with the
  same precision (PyTorch FSDP's `param_dtype=bf16, reduce_dtype=fp32`).

  Args:
    xs: [B, ..., *inputs], in `dtype`; their leading axis is the logical axis "batch".
    kernel: [*inputs, *outputs].
    axes: logical axes of the kernel in the products: those along which it is not gathered have a name.
    dtype: of the products.
  """
  whole = _gathered(kernel, axes, dtype)
  return tuple(_product(x, whole, contract) for x in xs)


def _forward(xs: Any, kernel: Array, contract: int, axes: Any, dtype: Any) -> tuple[Any, Any]:
  return products(xs, kernel, contract, axes, dtype), (xs, kernel)


def _backward(contract: int, axes: Any, dtype: Any, kept: Any, gradients: Any) -> tuple[Any, Array]:
  xs, kernel = kept
  whole = _gathered(kernel, axes, dtype)
  shards = _batch_shards()
  if any(x.shape[0] % shards for x in xs):
    shards = 1
  back, parts = [], []
  for x, gradient in zip(xs, gradients, strict=True):
    back += jax.linear_transpose(lambda y: _product(y, whole, contract), x)(gradient)
    parts.append(upcast(_by_shard(lambda *rows: _kernel_gradient(*rows, whole, contract), shards, x, gradient)))
  total = functools.reduce(jnp.add, reversed(parts))  # [shards, *inputs, *outputs]
  if shards > 1:
    total = nn.with_logical_constraint(total, ("batch", *axes))
  return tuple(back), jnp.sum(total, axis=0).astype(kernel.dtype)


products.defvjp(_forward, _backward)


def _gathered(kernel: Array, axes: tuple[str | None, ...], dtype: Any) -> Array:
  return nn.with_logical_constraint(kernel.astype(dtype), axes)


def _product(x: Array, kernel: Array, contract: int) -> Array:
  axes = tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))
  return jax.lax.dot_general(x, kernel, (axes, ((), ())))


def _kernel_gradient(x: Array, gradient: Array, like: Array, contract: int) -> Array:
  return jax.linear_transpose(lambda kernel: _product(x, kernel, contract), like)(gradient)[0]


def _by_shard(function: Callable[..., Array], shards: int, *arrays: Array) -> Array:
  """The results for the rows that each part of the mesh has, along a new leading axis: no sum over devices."""
  if shards == 1:
    return function(*arrays)[None]
  return jax.vmap(function)(*(x.reshape(shards, x.shape[0] // shards, *x.shape[1:]) for x in arrays))


def _batch_shards() -> int:
  """Over how many parts the mesh around this spreads the rows of a batch; 1 without a mesh."""
  mesh, (axes,) = jax.sharding.get_abstract_mesh(), nn.logical_to_mesh_axes(("batch",))
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape.get(axis, 1) for axis in axes)
