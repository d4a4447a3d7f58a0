"""Matrix products of 8-bit numbers with one scale a row: half the bytes, and on hardware that has them twice the speed.

As the reference trains its 7B model: every token and every output channel has a scale of its own, which puts its
largest value at the end of the type's range; products accumulate in wider types and are scaled back. Of the gradients,
that of the tokens is an 8-bit product, that of the weights is not.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.normalize import upcast
from vit_jax.ops.platform import platform

# name: type, largest value used, type in which products of two accumulate (None: that of the result)
_KINDS = {"fp8": (jnp.float8_e4m3fn, 448.0, None), "int8": (jnp.int8, 127.0, jnp.int32)}
QUANTIZATIONS = tuple(_KINDS)
_LEAST = 1e-12  # the largest value of a row counts as at least this


def quantize(x: Array, kind: str, axes: tuple[int, ...]) -> tuple[Array, Array]:
  """(values in 8 bits, scales) with x = values * scales up to rounding; one scale for all of `axes`, which stay as 1.

  Args:
    x: of any floating type; scales are float32.
    kind: "fp8" (e4m3) or "int8" (rounded to the nearest).
    axes: over which a scale is shared.
  """
  dtype, largest, _ = _KINDS[kind]
  x = upcast(x)
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), _LEAST) / largest
  values = jnp.clip(x / scale, -largest, largest)
  return (jnp.round(values) if kind == "int8" else values).astype(dtype), scale


def quantized_product(x: Float[Array, "... K"], values: Array, scale: Array, kind: str) -> Float[Array, "... N"]:
  """x W, with a scale for every row of x; in the type of x.

  Args:
    values: W [K, N] in 8 bits.
    scale: its scales [1, N].
  """
  return _scaled(x, values, jnp.squeeze(scale, 0), kind, 1)


def quantized_transpose(
  gradient: Float[Array, "... N"], values: Array, scale: Array, kind: str
) -> Float[Array, "... K"]:
  """g W^T, as `quantized_product`; the gradient of x, given that of x W.

  Args:
    values: W [K, N] in 8 bits, and its scale, one for all: [1, ...].
  """
  outputs = values.ndim - 1
  return _scaled(gradient, jnp.moveaxis(values, 0, -1), scale.reshape(1), kind, outputs)


def _scaled(x: Array, values: Array, scale: Array, kind: str, contract: int) -> Array:
  """The product over the last `contract` axes of x and the first of `values`, scaled back."""
  axes = tuple(range(x.ndim - contract, x.ndim))
  rows, row_scale = quantize(x, kind, axes)
  # On GPUs "highest" asks for exact accumulation, which 8-bit floating-point units have as an option.
  precision = jax.lax.Precision.HIGHEST if kind == "fp8" and platform() == "gpu" else None
  accumulated = _KINDS[kind][2] or x.dtype
  over = ((axes, tuple(range(contract))), ((), ()))
  y = jax.lax.dot_general(rows, values, over, precision=precision, preferred_element_type=accumulated)
  row_scale = jnp.expand_dims(jnp.squeeze(row_scale, axes), tuple(range(-scale.ndim, 0)))
  return (upcast(y) * row_scale * scale).astype(x.dtype)


def why_slow(kind: str) -> str | None:
  """Why products of this kind are no faster on this process's devices than in 16 bits; None: they are."""
  device = jax.local_devices()[0]
  if device.platform == "gpu":
    capability = str(getattr(device, "compute_capability", "unknown"))
    known = re.fullmatch(r"\d+\.\d+", capability)
    if kind == "fp8" and not (known and float(capability) >= 8.9):
      return f"GPUs have such products from compute capability 8.9 on, and this one has {capability}"
    return None
  if device.platform == "tpu":
    has = device.device_kind.startswith("TPU7") if kind == "fp8" else not re.match(r"TPU v[234]", device.device_kind)
    return None if has else f"a {device.device_kind} has no such products"
  return f"a {device.platform} has no such products"
