"""Axial 2-D rotary position tables and their application (DINOv3, section "RoPE"; RoFormer, Su et al. 2021)."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _rounder(dtype: str):
  """Rounds an array to `dtype` after every operation while it stays in a wide type.

  bfloat16 tables are defined by rounding each step; XLA may keep excess precision inside a fusion, so the rounding is
  explicit.
  """
  if dtype == "bfloat16":
    return lambda x: jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return lambda x: x


def _wide(dtype: str) -> jnp.dtype:
  return jnp.dtype("float64") if dtype == "float64" else jnp.dtype("float32")


def periods(
  head_dim: int, *, base: float | None, min_period: float | None, max_period: float | None, dtype: str
) -> Float[Array, " n"]:
  """Rotary periods, n = head_dim / 4: base^(4i / head_dim), or geometric from min_period to max_period.

  Raises:
    ValueError: if head_dim is not a multiple of 4, or not exactly one of the two forms is given.
  """
  if head_dim % 4:
    raise ValueError(f"rotary positions need a head width that is a multiple of 4, got {head_dim}: change num_heads.")
  by_range = min_period is not None and max_period is not None
  if (base is not None) == by_range:
    raise ValueError(
      f"give either rope.base or both rope.min_period and rope.max_period, got base={base}, "
      f"min_period={min_period}, max_period={max_period}."
    )
  rnd, n = _rounder(dtype), head_dim // 4
  index = jnp.arange(n, dtype=_wide(dtype))  # [n]
  if base is not None:
    exponent = rnd(rnd(2 * index) / (head_dim // 2))
    return rnd(jnp.power(jnp.asarray(base, exponent.dtype), exponent))
  ratio = max_period / min_period
  exponent = rnd(jnp.linspace(0.0, 1.0, n, dtype=_wide(dtype)))
  growth = rnd(jnp.power(jnp.asarray(ratio, exponent.dtype), exponent))
  return rnd(rnd(growth / ratio) * max_period)


def coordinates(height: int, width: int, *, normalize: str, dtype: str) -> Float[Array, "N 2"]:
  """Centres of the patches of a height x width grid in [-1, 1], rows slow, as (y, x).

  Args:
    normalize: "separate" divides each axis by its own length, "max"/"min" both by the longer/shorter one.
  """
  if normalize not in ("separate", "max", "min"):
    raise ValueError(f'rope.normalize must be "separate", "max" or "min", got {normalize!r}.')
  rnd, wide = _rounder(dtype), _wide(dtype)
  by = {"separate": (height, width), "max": (max(height, width),) * 2, "min": (min(height, width),) * 2}[normalize]

  def axis(length: int, divisor: int) -> Array:
    centre = rnd(rnd(jnp.arange(length, dtype=wide)) + 0.5)
    return rnd(rnd(2.0 * rnd(centre / divisor)) - 1.0)

  grid = jnp.meshgrid(axis(height, by[0]), axis(width, by[1]), indexing="ij")
  return jnp.stack(grid, axis=-1).reshape(height * width, 2)  # [N, 2]


def augment(
  coords: Float[Array, "N 2"],
  *,
  shift: Float[Array, " 2"] | None,
  log_jitter: Float[Array, " 2"] | None,
  log_rescale: Float[Array, " 1"] | None,
  dtype: str,
) -> Float[Array, "N 2"]:
  """Training-time augmentation of the coordinates: shift, then jitter per axis, then one common rescale."""
  rnd = _rounder(dtype)
  if shift is not None:
    coords = rnd(coords + rnd(shift))
  if log_jitter is not None:
    coords = rnd(coords * rnd(jnp.exp(rnd(log_jitter))))
  if log_rescale is not None:
    coords = rnd(coords * rnd(jnp.exp(rnd(log_rescale))))
  return coords


def tables(
  coords: Float[Array, "N 2"], period: Float[Array, " n"], *, dtype: str
) -> tuple[Float[Array, "N d"], Float[Array, "N d"]]:
  """(sin, cos) tables of width d = 4n, in `dtype`: the angles of y, then of x, tiled twice."""
  chex.assert_shape(coords, (None, 2), custom_message="tables takes coordinates [N, 2]", exception_type=ValueError)
  rnd = _rounder(dtype)
  angles = rnd(rnd((2 * math.pi) * coords)[:, :, None] / period)  # [N, 2, n]
  angles = jnp.tile(angles.reshape(coords.shape[0], -1), (1, 2))  # [N, d]
  return jnp.sin(angles).astype(dtype), jnp.cos(angles).astype(dtype)


def rotate(
  x: Float[Array, "B T H d"], sin: Float[Array, "... N d"], cos: Float[Array, "... N d"]
) -> Float[Array, "B T H d"]:
  """Rotates the last N of the T tokens (the patches) in the tables' dtype; bfloat16 rounds at each operation.

  The other tokens pass through the tables' dtype too, as in the reference.

  Args:
    sin, cos: [N, d], or [G, N, d] of as many groups of consecutive rows.

  Raises:
    ValueError: if the tables are not of such tokens.
  """
  words = f"rotate takes tokens [B, T, H, d], got {x.shape}, and tables [N, d] or [G, N, d], N <= T, got {sin.shape}"
  chex.assert_rank([x, sin], [4, {2, 3}], custom_message=words, exception_type=ValueError)
  chex.assert_equal_shape([sin, cos], custom_message=words, exception_type=ValueError)
  chex.assert_axis_dimension_lteq(sin, -2, x.shape[1], custom_message=words, exception_type=ValueError)
  chex.assert_axis_dimension(sin, -1, x.shape[-1], custom_message=words, exception_type=ValueError)
  dtype = sin.dtype
  rnd, wide = _rounder(dtype.name), _wide(dtype.name)
  x, result = rnd(x.astype(wide)), x.dtype
  prefix, patches = jnp.split(x, [x.shape[1] - sin.shape[-2]], axis=1)  # [B, T-N, H, d], [B, N, H, d]
  first, second = jnp.split(patches, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)  # [B, N, H, d]  rotate-half: i pairs with i + d/2
  sin, cos = (by_row(table.astype(wide), x.shape[0])[:, :, None] for table in (sin, cos))  # [1 or B, N, 1, d]
  rotated = rnd(rnd(patches * cos) + rnd(turned * sin))
  return jnp.concatenate([prefix, rotated], axis=1).astype(result)


def by_row(table: Float[Array, "... N d"], rows: int) -> Float[Array, "... N d"]:
  """Tables [N, d] of all rows as [1, N, d], those [G, N, d] of groups of rows as [rows, N, d]."""
  return table[None] if table.ndim == 2 else jnp.repeat(table, rows // table.shape[0], axis=0)
