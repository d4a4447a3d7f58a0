"""Products of several inputs with one weight that is spread over devices: gathered once, its gradient reduced once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from vit_jax.ops.linear import joined, kernel_gradient, product
from vit_jax.ops.normalize import upcast
from vit_jax.ops.platform import devices_of
from vit_jax.ops.quantized import quantize, quantized_product, quantized_transpose


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def products(
  xs: tuple[Array, ...],
  kernel: Array,
  inputs: int,
  axes: tuple[str | None, ...],
  dtype: Any,
  quantization: str | None = None,
) -> tuple[Array, ...]:
  """x W for every x, with W as `joined`: its `inputs` leading axes are the last one of x.

  The weight is cast before it is gathered, and gathered once for all inputs: in the forward pass, and again in the
  backward pass, which keeps no more of it than the part that a device has. Its gradient, of the rows of one device in
  `dtype`, is summed in float32, over the inputs first, so that devices exchange one sum. The reference trains with the
  same precision (PyTorch FSDP's `param_dtype=bf16, reduce_dtype=fp32`).

  Args:
    xs: [B, ..., K], in `dtype`; their leading axis is the logical axis "batch".
    kernel: W, with the axes that it is kept and spread with.
    axes: logical axes of the kernel in the products: those along which it is not gathered have a name.
    dtype: of the products.
    quantization: None, or in which 8 bits the products and those of the gradients of x are computed, and the weight
      travels: see `ops/quantized.py`.
  """
  if quantization is None:
    whole = _whole(kernel, inputs, axes, dtype)
    return tuple(product(x, whole) for x in xs)
  values, scale = _quantized(kernel, inputs, axes, dtype, quantization, tuple(range(inputs)))
  return tuple(quantized_product(x, values, scale, quantization) for x in xs)


def _forward(xs: Any, kernel: Array, inputs: int, axes: Any, dtype: Any, quantization: str | None) -> tuple[Any, Any]:
  return products(xs, kernel, inputs, axes, dtype, quantization), (xs, kernel)


def _backward(
  inputs: int, axes: Any, dtype: Any, quantization: str | None, kept: Any, gradients: Any
) -> tuple[Any, Array]:
  xs, kernel = kept
  if quantization is None:
    whole = _whole(kernel, inputs, axes, dtype)
    pairs = zip(xs, gradients, strict=True)
    back = tuple(jax.linear_transpose(lambda y: product(y, whole), x)(gradient)[0] for x, gradient in pairs)
  else:
    values, scale = _quantized(kernel, inputs, axes, dtype, quantization, tuple(range(kernel.ndim)))
    back = tuple(quantized_transpose(gradient, values, scale, quantization) for gradient in gradients)
  shards = batch_shards()
  if any(x.shape[0] % shards for x in xs):
    shards = 1
  like = jax.eval_shape(lambda kernel: joined(kernel.astype(dtype), inputs), kernel)
  parts = [
    upcast(_by_shard(lambda *rows: kernel_gradient(*rows, like), shards, x, gradient))
    for x, gradient in zip(xs, gradients, strict=True)
  ]
  total = functools.reduce(jnp.add, reversed(parts)).reshape(shards, *kernel.shape)
  if shards > 1:
    total = nn.with_logical_constraint(total, ("batch", *axes))
  return back, jnp.sum(total, axis=0).astype(kernel.dtype)


products.defvjp(_forward, _backward)


def _whole(kernel: Array, inputs: int, axes: tuple[str | None, ...], dtype: Any) -> Array:
  return joined(nn.with_logical_constraint(kernel.astype(dtype), axes), inputs)


def _quantized(
  kernel: Array, inputs: int, axes: tuple[str | None, ...], dtype: Any, quantization: str, shared: tuple[int, ...]
) -> tuple[Array, Array]:
  """The gathered weight in 8 bits, and its scales, each for all of the axes `shared`; both `joined`."""
  values, scale = quantize(kernel.astype(dtype), quantization, shared)
  # Left to itself, XLA gathers wider types and narrows them then; and some backends send no 8-bit floating point.
  plain = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(values, jnp.uint8))
  whole = jax.lax.bitcast_convert_type(nn.with_logical_constraint(plain, axes), values.dtype)
  kept = tuple(None if axis in shared else name for axis, name in enumerate(axes))
  return joined(whole, inputs), joined(nn.with_logical_constraint(scale, kept), inputs)


def _by_shard(function: Callable[..., Array], shards: int, *arrays: Array) -> Array:
  """The results for the rows that each part of the mesh has, along a new leading axis: no sum over devices."""
  if shards == 1:
    return function(*arrays)[None]
  return jax.vmap(function)(*(x.reshape(shards, x.shape[0] // shards, *x.shape[1:]) for x in arrays))


def batch_shards() -> int:
  """Over how many parts the mesh around this spreads the rows of a batch; 1 without a mesh."""
  return devices_of(*nn.logical_to_mesh_axes(("batch",)))
