"""Scaled dot-product attention, dispatched to the fastest exact implementation of the backend."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_jax.ops import rope
from vit_jax.ops.fused_attention import Tables, fused_attention, why_not_fused
from vit_jax.ops.splash import WHOLE, splash_attention, why_not_splash

_WIDEST_HEAD = 128  # of cuDNN's flash attention on every GPU it runs on
_HALF = (jnp.bfloat16, jnp.float16)
_LARGEST_ERROR = 0.02  # of a result in bfloat16, as a share of the largest

_log = logging.getLogger(__name__)


def self_attention(
  qkv: Float[Array, "B T 3 H d"], tables: Tables | None = None, *, spec: jax.P = WHOLE, recompute: bool = False
) -> Float[Array, "B T H d"]:
  """`attention` of queries and keys whose last N tokens are rotated first; on TPU one kernel if short enough.

  Args:
    tables: rotary (sin, cos) of these tokens, as for `rope.rotate`; None: no rotation.
    spec: how the mesh around this, if there is one, divides the axes of `qkv`.
    recompute: as for `attention`.

  Raises:
    ValueError: for another shape.
  """
  words = "self_attention takes queries, keys and values as one array [B, T, 3, H, d]"
  chex.assert_shape(qkv, (None, None, 3, None, None), custom_message=words, exception_type=ValueError)
  if why_not_fused(qkv.shape, qkv.dtype, spec) is None and (jax.default_backend() != "tpu" or why_no_fused() is None):
    return fused_attention(qkv, tables, spec)
  return _in_parts(qkv, tables, spec=spec, recompute=recompute)


def _in_parts(
  qkv: Float[Array, "B T 3 H d"], tables: Tables | None = None, *, spec: jax.P = WHOLE, recompute: bool = False
) -> Float[Array, "B T H d"]:
  query, key, value = (qkv[:, :, i] for i in range(3))  # [B, T, H, d]
  if tables is not None:
    query, key = rope.rotate(query, *tables), rope.rotate(key, *tables)
  return attention(query, key, value, spec=jax.P(*spec[:2], *spec[3:]), recompute=recompute)


def attention(
  query: Float[Array, "B T H d"],
  key: Float[Array, "B T H d"],
  value: Float[Array, "B T H d"],
  *,
  spec: jax.P = WHOLE,
  recompute: bool = False,
) -> Float[Array, "B T H d"]:
  """softmax(q k^T / sqrt(d)) v without mask or dropout; the softmax in float32 (float64 for float64 inputs).

  On GPU this is cuDNN's flash attention where that can be (`why_not_cudnn`), on TPU the splash kernel where that moves
  less (`why_not_splash`); elsewhere two products for XLA.

  Args:
    spec: how the mesh around this, if there is one, divides the axes of the arguments.
    recompute: the backward pass computes the weights [B, H, T, T] once more instead of keeping them; flash attention
      always does.

  Raises:
    ValueError: for other shapes or types.
  """
  words = "attention takes queries, keys and values [B, T, H, d] of one float type"
  chex.assert_rank([query, key, value], 4, custom_message=words, exception_type=ValueError)
  chex.assert_equal_shape([query, key, value], dims=(0, 2, 3), custom_message=words, exception_type=ValueError)
  chex.assert_equal_shape([key, value], custom_message=words, exception_type=ValueError)
  chex.assert_type([query, key, value], query.dtype, custom_message=words, exception_type=ValueError)
  if jax.default_backend() == "gpu" and why_not_cudnn(query.shape, query.dtype) is None and why_no_cudnn() is None:
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
  if why_not_splash(query.shape, query.dtype, spec) is None:
    return splash_attention(query, key, value, spec)
  plain = jax.checkpoint(plain_attention, prevent_cse=False) if recompute else plain_attention
  return plain(query, key, value)


def why_not_cudnn(shape: tuple[int, ...], dtype: Any) -> str | None:
  """Why cuDNN's flash attention cannot take queries [B, T, H, d] of this shape and type; None: it can."""
  if len(shape) != 4:
    return f"it takes queries [B, T, H, d], and these have {len(shape)} axes"
  if dtype not in _HALF:
    return f"it computes in 16 bits, and model.dtype is {jnp.dtype(dtype).name}"
  if shape[-1] % 8 or shape[-1] > _WIDEST_HEAD:
    return f"it takes heads whose width is a multiple of 8 up to {_WIDEST_HEAD}, and these are {shape[-1]} wide"
  return None


@functools.cache
def why_no_cudnn() -> str | None:
  """Why there is no flash attention of cuDNN on this process's GPUs, whatever the shape; None: there is."""
  capability = str(getattr(jax.local_devices()[0], "compute_capability", "unknown"))
  if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < 8.0:
    return f"it is for NVIDIA's GPUs from compute capability 8.0 on, and this one has {capability}"
  sample = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
  try:  # JAX says at once what it misses: the library, or a version of it
    jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), *[sample] * 3)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    return str(error)
  return None


@functools.cache
def why_no_fused(*, interpret: bool = False) -> str | None:
  """Why not to trust the kernel on this process's TPUs: it fails, or is wrong, on an example; None: it is right.

  It was written without a TPU. The example is computed in a thread of its own, which knows nothing of the program that
  is being traced.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    try:
      error = pool.submit(_error_of_fused, interpret).result()
    except Exception as failure:  # whatever a compiler or a device says: there is another way
      reason = f"it fails on an example: {str(failure).partition(chr(10))[0]}"
    else:
      if error <= _LARGEST_ERROR:
        return None
      reason = f"it is off by {error:.1%} on an example"
  _log.warning("Attention by XLA, which is slower, instead of the kernel of ops/fused_attention.py: %s.", reason)
  return reason


def _error_of_fused(interpret: bool) -> float:
  """The largest error of the kernel and its gradient on an example, as a share of the largest value."""
  rng = np.random.default_rng(0)
  qkv, gradient = (jnp.asarray(rng.standard_normal((3, 41, *ends)), jnp.bfloat16) for ends in ((3, 2, 64), (2, 64)))
  angles = np.tile(rng.uniform(-3, 3, (36, 32)).astype(np.float32), 2)
  tables = jnp.sin(angles), jnp.cos(angles)

  def values(function: Any) -> list[np.ndarray]:
    y, back = jax.vjp(lambda qkv: function(qkv, tables), qkv)
    return [np.asarray(x, np.float32) for x in (y, *back(gradient))]

  pairs = zip(values(functools.partial(fused_attention, interpret=interpret)), values(_in_parts), strict=True)
  return max(float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))) for ours, theirs in pairs)


def plain_attention(
  query: Float[Array, "B T H d"], key: Float[Array, "B T H d"], value: Float[Array, "B T H d"]
) -> Float[Array, "B T H d"]:
  """The two products spelled out for XLA, with the division by the softmax's sum after the second.

  That sum divides [T, d] values instead of [T, T], and on a CPU the first product, the exponential and the second make
  one fused kernel: forward at 201 tokens in half the time of `jax.nn.softmax` between two einsums.
  """
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scale = query.shape[-1] ** -0.5
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))  # [B, H, T, d]
  if query.dtype == wide:
    query, scale = query * scale, 1.0  # 16 bits would round the product
  logits = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=wide) * scale  # [B, H, T, T]
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))  # cancels out
  weights = jnp.exp(logits - largest)  # [B, H, T, T], up to 1
  total = jnp.sum(weights, axis=-1, keepdims=True)  # [B, H, T, 1]
  y = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(value.dtype), value, preferred_element_type=wide) / total
  return jnp.swapaxes(y, 1, 2).astype(value.dtype)  # [B, T, H, d]
