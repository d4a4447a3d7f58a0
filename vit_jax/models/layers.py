"""The layers every module is made of: linear maps with N-d kernels, norms, layer scale."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.products import products
from vit_jax.models.remat import linear_outputs
from vit_jax.ops.linear import joined, linear
from vit_jax.ops.normalize import layer_norm, upcast

INIT_STD = 0.02  # of the published models' initial weights
# The reference cuts its truncated normal at an absolute 2, a hundred standard deviations: a plain normal.
linear_init = nn.initializers.normal(INIT_STD)


def fan_in_uniform(fan_in: int) -> nn.initializers.Initializer:
  """U(-a, a) with a = sqrt(1 / fan_in): PyTorch's default for convolutions, which the patch embedding keeps."""
  bound = math.sqrt(1.0 / fan_in)
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def spread(param: Array, shape: tuple[int, ...], dtype: Any) -> Array:
  """A parameter over the leading axes of `shape`, in `dtype`; its gradient is summed over them in float32.

  In bfloat16 that sum, over all tokens of a batch, would keep two or three digits at best.
  """
  return jnp.broadcast_to(param.astype(dtype), shape)


def _spread(param: Array, shape: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
  return spread(param, shape, dtype), param


def _gathered(shape: tuple[int, ...], dtype: Any, param: Array, gradient: Array) -> tuple[Array]:
  axes = tuple(range(len(shape) - param.ndim))
  return (jnp.sum(upcast(gradient), axis=axes).astype(param.dtype),)


spread.defvjp(_spread, _gathered)


class Linear(nn.Module):
  """y = x W + b over the last axis of x, onto axes of shape `features`.

  Attributes:
    features: the output axes; an N-d kernel lets `heads` be an axis of its own, which sharding needs.
    inputs: the input axes of the kernel, which are one in x; None: one axis.
    init_std: standard deviation of the initial kernel.
    kernel_axes: logical axes of the kernel in the product, where they are not for the compiler to choose. Inputs that
      are a tuple need them.
    quantization: None, or the 8 bits in which the products of a tuple of inputs are computed, see `products`.
    dtype: compute type of the product; the kernel is kept in `param_dtype`.
  """

  features: tuple[int, ...]
  inputs: tuple[int, ...] | None = None
  use_bias: bool = True
  init_std: float = INIT_STD
  kernel_axes: tuple[str | None, ...] | None = None
  quantization: str | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Array | tuple[Array, ...]) -> Array | tuple[Array, ...]:
    """y for x; for a tuple of them a tuple of theirs, for which a spread kernel is gathered once (`products`)."""
    *leading, width = (x[0] if isinstance(x, tuple) else x).shape
    inputs = self.inputs or (width,)
    kernel = self.param("kernel", nn.initializers.normal(self.init_std), (*inputs, *self.features), self.param_dtype)
    if isinstance(x, tuple):
      dtype = jnp.dtype(self.dtype)
      xs = tuple(one.astype(dtype) for one in x)
      ys = linear_outputs(products(xs, kernel, len(inputs), self.kernel_axes, dtype, self.quantization))
    else:
      kernel = kernel.astype(self.dtype)
      if self.kernel_axes is not None:
        kernel = nn.with_logical_constraint(kernel, self.kernel_axes)
      ys = linear_outputs(linear(x.astype(self.dtype), joined(kernel, len(inputs))))
    if self.use_bias:
      bias = self.adjust_bias(self.param("bias", nn.initializers.zeros, self.features, self.param_dtype))
      bias = joined(bias, 0)[0]  # as the kernel
      ys = jax.tree.map(lambda y: y + spread(bias, y.shape, y.dtype), ys)
    return jax.tree.map(lambda y: y.reshape(*y.shape[: len(leading)], *self.features), ys)

  def adjust_bias(self, bias: Array) -> Array:
    """The bias that is added; a hook for layers that mask a part of it."""
    return bias


class LayerNorm(nn.Module):
  """Layer normalisation in float32, returned in `dtype`."""

  eps: float
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
    return layer_norm(x, scale, bias, self.eps, jnp.dtype(self.dtype))


class RMSNorm(nn.Module):
  """Root-mean-square normalisation in float32, without bias, returned in `dtype`."""

  eps: float
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
    return layer_norm(x, scale, None, self.eps, jnp.dtype(self.dtype))


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def make_norm(kind: str, *, eps: float, dtype: Any, param_dtype: Any, name: str | None = None) -> nn.Module:
  """The norm called `kind`.

  Raises:
    ValueError: if there is no such norm.
  """
  if kind not in NORMS:
    raise ValueError(f"norm must be one of {sorted(NORMS)}, got {kind!r}.")
  return NORMS[kind](eps=eps, dtype=dtype, param_dtype=param_dtype, name=name)


class LayerScale(nn.Module):
  """A learned factor per channel on a residual branch (CaiT, Touvron et al. 2021)."""

  init: float
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    gamma = self.param("gamma", nn.initializers.constant(self.init), x.shape[-1:], self.param_dtype)
    return x * spread(gamma, x.shape, x.dtype)
