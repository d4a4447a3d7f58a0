"""Flash attention on TPUs by the splash kernel of JAX, for the lengths at which it moves less than XLA's attention.

XLA writes the weights [T, T] to memory and reads them several times; the kernel keeps them on the chip, but pads the
tokens to a multiple of its blocks and heads of 64 to 128. Compiled for v5p, 16 heads of 64, bfloat16, forward and
backward, 12.8k tokens in all: at 41 tokens it moves 2.6 GiB where XLA moves 1.3, at 201 tokens 1.5 where XLA moves 1.7,
at 1029 tokens 1.5 where XLA moves 6.2. So XLA keeps the crops of up to 256 pixels, and the kernel takes those of 512
and 768. It was never run on a TPU: its values are checked in Pallas's interpreter, and that it compiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.ops.platform import devices_of, platform

LEAST_TOKENS = 512
WHOLE = jax.P()  # nothing is divided
_BLOCKS = (512, 384, 256)  # tokens of a block of the kernel, multiples of 128
_HEAD = 64  # widths of heads are to be multiples of it


def why_not_splash(shape: tuple[int, ...], dtype: Any, spec: jax.P = WHOLE) -> str | None:
  """Why the kernel does not take queries [B, T, H, d] of this shape, type and partition; None: it does."""
  if platform() != "tpu":
    return f"it is for TPUs, and this is for {platform()}"
  if len(shape) != 4:
    return f"it takes queries [B, T, H, d], and these have {len(shape)} axes"
  if dtype != jnp.bfloat16:
    return f"it is for bfloat16, and model.dtype is {jnp.dtype(dtype).name}"
  if shape[-1] % _HEAD:
    return f"it takes heads whose width is a multiple of {_HEAD}, and these are {shape[-1]} wide"
  if shape[1] < LEAST_TOKENS:
    return f"XLA's own moves less below {LEAST_TOKENS} tokens, and these are {shape[1]}"
  for axis, (size, names) in enumerate(zip(shape, spec, strict=False)):
    if size % devices_of(names):
      return f"axis {axis} of {size} does not divide over {devices_of(names)} devices"
  return None


def splash_attention(
  query: Float[Array, "B T H d"],
  key: Float[Array, "B T H d"],
  value: Float[Array, "B T H d"],
  spec: jax.P = WHOLE,
  *,
  interpret: bool = False,
) -> Float[Array, "B T H d"]:
  """softmax(q k^T / sqrt(d)) v by the kernel, each device its own part.

  Args:
    spec: how the mesh around this, if there is one, divides the axes of the arguments; T and d stay whole.
    interpret: run it in Pallas's interpreter, on any device.
  """

  def local(*qkv: Array) -> Array:
    return _on_one_device(*qkv, interpret=interpret)

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(query, key, value)
  # XLA cannot divide a kernel that it does not know.
  return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(query, key, value)


def _on_one_device(query: Array, key: Array, value: Array, *, interpret: bool) -> Array:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  _, tokens, heads, width = query.shape
  block = min(_BLOCKS, key=lambda size: (-tokens % size, -size))
  padding = -tokens % block
  length = tokens + padding

  def prepare(x: Array) -> Array:
    return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, padding), (0, 0)])  # [B, H, length, d]

  forward = {"block_q": block, "block_kv": block, "block_kv_compute": block}
  backward = {f"{name}_dkv" if "compute" not in name else "block_kv_dkv_compute": block for name in forward}
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([masks.FullMask((length, length))] * heads),
    block_sizes=splash.BlockSizes(**forward, **backward, use_fused_bwd_kernel=True),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  segment = (jnp.arange(length) < tokens).astype(jnp.int32)  # padding attends to padding only
  segments = splash.SegmentIds(segment, segment)
  query = query * jnp.asarray(width**-0.5, query.dtype)  # the kernel does not scale
  y = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(*map(prepare, (query, key, value)))
  return jnp.swapaxes(y[:, :, :tokens], 1, 2)  # [B, T, H, d]
