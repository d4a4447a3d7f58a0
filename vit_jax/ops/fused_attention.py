"""Attention on TPUs as one kernel: rotary positions, both products and the softmax, without a weight in memory.

For sequences that are whole on the chip, so short that splash attention would compute and move padding (`ops/splash.py`
takes the longer ones). XLA writes rotated queries and keys, the weights [T, T], and a transposition of most of them to
memory, padded from 37 tokens or heads of 64 to tiles of 128; the kernel reads what the linear map wrote and writes what
the next one reads. It works on 128 channels at a time, as they lie: the heads in them are told apart by masks, which
costs the matrix unit nothing, as it is 128 deep as well. Local crops are not packed: a tile of weights has a row per
query either way, and several crops side by side would fill it with weights that a mask throws away.

Compiled for v5p, the attention of a block of ViT-L/16 with both its maps and all gradients, 89 crops of 201 tokens,
moves 1.3 GB instead of 5.4, and 358 crops of 37 tokens 1.2 instead of 3.3. It was never run on a TPU: its values are
checked in Pallas's interpreter, and that it compiles; a process that has one tries it on an example before it trusts it
(`attention.why_no_fused`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from vit_jax.ops.platform import devices_of, platform
from vit_jax.ops.rope import by_row
from vit_jax.ops.splash import LEAST_TOKENS, WHOLE

Tables = tuple[Float[Array, "... N d"], Float[Array, "... N d"]]
_LANES = 128
_BLOCK_BYTES = 2**20  # of the queries, keys and values of a block; at most 16 MiB hold all that the kernel needs


def why_not_fused(shape: tuple[int, ...], dtype: Any, spec: jax.P = WHOLE) -> str | None:
  """Why the kernel does not take queries, keys and values [B, T, 3, H, d] of this kind and partition; None: it does."""
  if platform() != "tpu":
    return f"it is for TPUs, and this is for {platform()}"
  if dtype != jnp.bfloat16:
    return f"it is for bfloat16, and model.dtype is {jnp.dtype(dtype).name}"
  _, tokens, _, heads, width = shape
  if tokens >= LEAST_TOKENS:
    return f"it is for fewer than {LEAST_TOKENS} tokens, and these are {tokens}"
  for axis, (size, names) in enumerate(zip(shape, spec, strict=False)):
    if size % devices_of(names):
      return f"axis {axis} of {size} does not divide over {devices_of(names)} devices"
  own = heads // devices_of(spec[3]) if len(spec) > 3 else heads
  if _LANES % width or own * width % _LANES:
    return f"it takes heads that fill {_LANES} channels, and these are {own} of {width} on a device"
  return None


def fused_attention(
  qkv: Float[Array, "B T 3 H d"], tables: Tables | None = None, spec: jax.P = WHOLE, *, interpret: bool = False
) -> Float[Array, "B T H d"]:
  """softmax(q k^T / sqrt(d)) v, with the last N tokens of q and k rotated (`rope.rotate`); the softmax in float32.

  Args:
    qkv: bfloat16.
    tables: rotary (sin, cos) of the last N tokens, [N, d] or [G, N, d] of groups of rows; None: no rotation.
    spec: how the mesh around this, if there is one, divides the axes of `qkv`: B and H, or neither.
    interpret: run it in Pallas's interpreter, on any device.
  """
  rounds = tables is not None and tables[0].dtype == jnp.bfloat16

  def local(qkv: Array, *tables: Array) -> Array:
    batch, tokens, _, heads, width = qkv.shape
    joined = jnp.moveaxis(qkv.reshape(batch, tokens, 3, heads * width), 2, 0)  # [3, B, T, H d]
    kind = _Kind(width, rounds, interpret)
    return _attention(joined, _by_lane(*tables, tokens) if tables else (), kind).reshape(batch, tokens, heads, width)

  tables = tables or ()
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(qkv, *tables)
  # XLA cannot divide a kernel that it does not know.
  axes = (*spec, *[None] * (qkv.ndim - len(spec)))
  where = WHOLE
  if tables and tables[0].ndim == 3:
    where = jax.P(axes[0])
    if tables[0].shape[0] % devices_of(axes[0]):  # a group has rows on several devices
      tables = tuple(by_row(table, qkv.shape[0]) for table in tables)
  specs, out = (jax.P(*axes), *[where] * len(tables)), jax.P(*axes[:2], *axes[3:])
  return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(qkv, *tables)


class _Kind(NamedTuple):
  """What a kernel is compiled for: width of a head, whether rotations round as bfloat16, where it runs."""

  width: int
  rounds: bool
  interpret: bool


def _by_lane(sin: Float[Array, "... N d"], cos: Float[Array, "... N d"], tokens: int) -> tuple[Array, Array]:
  """The tables of all tokens and lanes [G, T, 128]: tokens before the patches at angle zero, the sine with the sign
  that the rotation gives it."""
  width, before = sin.shape[-1], ((0, 0), (tokens - sin.shape[-2], 0), (0, 0))
  sign = np.where(np.arange(width) < width // 2, -1.0, 1.0).astype(np.float32)
  sin, cos = (table.reshape(-1, *table.shape[-2:]).astype(jnp.float32) for table in (sin, cos))
  sin, cos = jnp.pad(sin * sign, before), jnp.pad(cos, before, constant_values=1.0)
  return tuple(jnp.tile(table, (1, 1, _LANES // width)) for table in (sin, cos))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attention(qkv: Float[Array, "3 B T HD"], tables: tuple[Array, ...], kind: _Kind) -> Float[Array, "B T HD"]:
  return _call(_forward_kernel, (qkv,), tables, kind, jax.ShapeDtypeStruct(qkv.shape[1:], qkv.dtype))


def _keep(qkv: Array, tables: tuple[Array, ...], kind: _Kind) -> tuple[Array, tuple[Any, ...]]:
  return _attention(qkv, tables, kind), (qkv, tables)


def _pull(kind: _Kind, kept: tuple[Any, ...], gradient: Array) -> tuple[Array, None]:
  qkv, tables = kept
  return _call(_backward_kernel, (qkv, gradient), tables, kind, jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)), None


_attention.defvjp(_keep, _pull)


def _call(
  kernel: Callable[..., None], arrays: tuple[Array, ...], tables: tuple[Array, ...], kind: _Kind, out: Any
) -> Array:
  """The kernel over blocks of rows and channels; `arrays` and `out` are [B, T, H d] or three of these."""
  *_, batch, tokens, channels = out.shape
  groups = tables[0].shape[0] if tables else 1
  rows, lanes = _block(batch // groups, tokens, channels, whole=groups > 1)
  blocks = batch // groups // rows  # of a group

  def spec(x: Any) -> pl.BlockSpec:
    if x.ndim == 4:
      return pl.BlockSpec((3, rows, tokens, lanes), lambda i, j: (0, i, 0, j))
    return pl.BlockSpec((rows, tokens, lanes), lambda i, j: (i, 0, j))

  table = pl.BlockSpec((1, tokens, _LANES), lambda i, j: (lax.div(i, blocks) if groups > 1 else 0, 0, 0))
  return pl.pallas_call(
    functools.partial(kernel, kind=kind),
    out_shape=out,
    grid=(pl.cdiv(batch, rows), channels // lanes),
    in_specs=[*map(spec, arrays), *[table] * len(tables)],
    out_specs=spec(out),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    interpret=kind.interpret,
    name=kernel.__name__.strip("_"),
  )(*arrays, *tables)


def _block(batch: int, tokens: int, channels: int, *, whole: bool) -> tuple[int, int]:
  """Rows and channels of a block: as many channels as `_BLOCK_BYTES` hold of a row, as many rows as they hold then.

  Args:
    whole: no block is cut short: its rows divide `batch`.
  """
  column = 3 * 2 * -(-tokens // 16) * 16  # bytes of a channel of a row: bfloat16 lies in tiles of 16 tokens
  wide = [lanes for lanes in range(_LANES, channels + 1, _LANES) if channels % lanes == 0]
  lanes = max((lanes for lanes in wide if column * lanes <= _BLOCK_BYTES), default=_LANES)
  rows = min(max(_BLOCK_BYTES // (column * lanes), 1), batch)
  while whole and batch % rows:
    rows -= 1
  return rows, lanes


def _forward_kernel(qkv: Any, *refs: Any, kind: _Kind) -> None:
  *tables, y = refs
  rotate, _ = _rotations(tables, kind)

  def heads(row: Any, lanes: slice) -> None:
    q, k, v = rotate(qkv[0, row, :, lanes]), rotate(qkv[1, row, :, lanes]), qkv[2, row, :, lanes]  # [T, 128]
    total = 0.0
    for head in range(_LANES // kind.width):
      weights, norm = _weights(q, _only(k, head, kind), kind)
      total += _product(weights.astype(v.dtype), _only(v, head, kind), (1, 0)) / norm  # [T, 128]
    y[row, :, lanes] = total.astype(y.dtype)

  _each_part(y, heads)


def _backward_kernel(qkv: Any, gradient: Any, *refs: Any, kind: _Kind) -> None:
  *tables, out = refs
  rotate, turn_back = _rotations(tables, kind)

  def heads(row: Any, lanes: slice) -> None:
    q, k, v = rotate(qkv[0, row, :, lanes]), rotate(qkv[1, row, :, lanes]), qkv[2, row, :, lanes]  # [T, 128]
    dy = gradient[row, :, lanes]  # [T, 128]
    dq = dk = dv = 0.0
    for head in range(_LANES // kind.width):
      own_q, own_k, own_dy = (_only(x, head, kind) for x in (q, k, dy))
      weights, norm = _weights(q, own_k, kind)
      weights = weights / norm  # [T, T]
      dv += _product(weights.astype(dy.dtype), own_dy, (0, 0))  # [T, 128]
      by_weight = _product(own_dy, v, (1, 1))  # [T, T]
      centred = by_weight - jnp.sum(by_weight * weights, axis=-1, keepdims=True)
      by_logit = (weights * centred * kind.width**-0.5).astype(q.dtype)  # [T, T]
      dq += _product(by_logit, own_k, (1, 0))  # [T, 128]
      dk += _product(by_logit, own_q, (0, 0))  # [T, 128]
    for i, value in enumerate((turn_back(dq), turn_back(dk), dv)):
      out[i, row, :, lanes] = value.astype(out.dtype)

  _each_part(gradient, heads)


def _each_part(block: Any, function: Callable[[Any, slice], None]) -> None:
  """The function for every row of a block [rows, T, lanes] and every 128 lanes of it."""
  rows, _, lanes = block.shape

  def row(i: Any, carry: None) -> None:
    for first in range(0, lanes, _LANES):
      function(i, slice(first, first + _LANES))

  lax.fori_loop(0, rows, row, None)


def _weights(q: Float[Array, "T 128"], k: Float[Array, "T 128"], kind: _Kind) -> tuple[Array, Array]:
  """The weights of a head up to a factor [T, T], and their sums [T, 1]."""
  logits = _product(q, k, (1, 1)) * kind.width**-0.5  # [T, T]
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  return weights, jnp.sum(weights, axis=-1, keepdims=True)


def _product(a: Array, b: Array, over: tuple[int, int]) -> Array:
  """The product of two matrices over these axes, in float32."""
  dimensions = ((over[:1], over[1:]), ((), ()))
  return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _only(x: Float[Array, "T 128"], head: int, kind: _Kind) -> Float[Array, "T 128"]:
  """The channels of one head, the others zero."""
  if kind.width == _LANES:
    return x
  return jnp.where(lax.div(_lane(x), kind.width) == head, x, jnp.zeros_like(x))


def _rotations(tables: Sequence[Any], kind: _Kind) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
  """The rotation of queries and keys, and that of their float32 gradients back."""
  if not tables:
    return (lambda x: x), (lambda x: x)
  sin, cos = (table[0] for table in tables)  # [T, 128]
  rounded = (lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)) if kind.rounds else (lambda x: x)

  def rotate(x: Float[Array, "T 128"]) -> Float[Array, "T 128"]:
    wide = x.astype(jnp.float32)
    return (rounded(wide * cos) + rounded(_other_half(wide, kind) * sin)).astype(x.dtype)

  def turn_back(x: Float[Array, "T 128"]) -> Float[Array, "T 128"]:
    return x * cos + _other_half(x * sin, kind)

  return rotate, turn_back


def _other_half(x: Float[Array, "T 128"], kind: _Kind) -> Float[Array, "T 128"]:
  """Every channel's partner in a rotation: the one half a head away."""
  half = kind.width // 2
  if kind.width == _LANES:
    return pltpu.roll(x, half, 1)
  return jnp.where(lax.rem(_lane(x), kind.width) < half, pltpu.roll(x, _LANES - half, 1), pltpu.roll(x, half, 1))


def _lane(x: Array) -> Array:
  return lax.broadcasted_iota(jnp.int32, x.shape, 1)
