"""The transformer block, run on every crop resolution at once, with stochastic depth that skips compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_jax.models.attention import SelfAttention, Tables
from vit_jax.models.layers import LayerScale, make_norm
from vit_jax.models.mlp import MLPS
from vit_jax.models.remat import block_inputs

_WHERE = {"unique_indices": True, "mode": "promise_in_bounds"}  # of the rows that drop path keeps


@flax.struct.dataclass
class BlockInputs:
  """What one block needs besides the tokens of one resolution; None: off.

  Attributes:
    tables: rotary (sin, cos).
    kept: rows of each loss group whose attention branch (0) and feed-forward branch (1) are computed, [2, groups, m].
  """

  tables: Tables | None = None
  kept: Int[Array, "2 groups m"] | None = None


def kept_rows(rows: int, rate: float) -> int:
  """How many of `rows` samples keep a residual branch at drop-path `rate`: exact, at least one."""
  return max(int(rows * (1 - rate)), 1)


def draw_kept(key: jax.Array, *, depth: int, groups: int, rows: int, rate: float) -> Int[Array, "L 2 groups m"]:
  """Independent random subsets of the `rows` of every loss group, per block and branch."""
  order = jnp.argsort(jax.random.uniform(key, (depth, 2, groups, rows)), axis=-1)  # [L, 2, groups, rows]
  return order[..., : kept_rows(rows, rate)]


class Block(nn.Module):
  """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))), for a tuple of token arrays that share the parameters."""

  num_heads: int
  mlp_kind: str
  mlp_hidden: int
  layer_scale: float | None
  qkv_bias: bool
  proj_bias: bool
  mlp_bias: bool
  mask_k_bias: bool
  qk_norm: bool
  norm_kind: str
  norm_eps: float
  init_std: float
  dtype: Any
  param_dtype: Any
  recompute_attention: bool = False
  quantization: str | None = None

  def setup(self) -> None:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    if self.mlp_kind not in MLPS:
      raise ValueError(f"mlp must be one of {sorted(MLPS)}, got {self.mlp_kind!r}.")
    self.norm1 = make_norm(self.norm_kind, eps=self.norm_eps, **types)
    self.attn = SelfAttention(
      self.num_heads,
      qkv_bias=self.qkv_bias,
      proj_bias=self.proj_bias,
      mask_k_bias=self.mask_k_bias,
      qk_norm=self.qk_norm,
      norm_kind=self.norm_kind,
      norm_eps=self.norm_eps,
      init_std=self.init_std,
      recompute=self.recompute_attention,
      quantization=self.quantization,
      **types,
    )
    self.norm2 = make_norm(self.norm_kind, eps=self.norm_eps, **types)
    maps = {"use_bias": self.mlp_bias, "init_std": self.init_std, "quantization": self.quantization}
    self.mlp = MLPS[self.mlp_kind](self.mlp_hidden, **maps, **types)
    if self.layer_scale is not None:
      self.ls1 = LayerScale(self.layer_scale, param_dtype=self.param_dtype)
      self.ls2 = LayerScale(self.layer_scale, param_dtype=self.param_dtype)

  def __call__(self, xs: tuple[Float[Array, "B T D"], ...], inputs: tuple[BlockInputs, ...]) -> tuple[Array, ...]:
    scale1, scale2 = (self.ls1, self.ls2) if self.layer_scale is not None else (lambda y: y, lambda y: y)
    kept1, kept2 = zip(*((None, None) if entry.kept is None else entry.kept for entry in inputs), strict=True)
    tables = tuple(entry.tables for entry in inputs)
    xs = add_branch(block_inputs(xs), lambda ys: _each(scale1, self.attn(_each(self.norm1, ys), tables)), kept1)
    xs = add_branch(xs, lambda ys: _each(scale2, self.mlp(_each(self.norm2, ys))), kept2)
    return _each(lambda x: nn.with_logical_constraint(x, ("batch", None, "width")), xs)


def _each(function: Callable[[Array], Array], xs: tuple[Array, ...]) -> tuple[Array, ...]:
  return tuple(function(x) for x in xs)


def add_branch(
  xs: tuple[Float[Array, "B T D"], ...],
  branch: Callable[[tuple[Array, ...]], tuple[Array, ...]],
  kept: tuple[Int[Array, "groups m"] | None, ...],
) -> tuple[Float[Array, "B T D"], ...]:
  """x + branch(x) for every x; where `kept`, the branch runs on these rows of each group only, scaled by rows / m.

  Stochastic depth by batch subset (DINOv2 section 4): the other rows skip the compute.
  """
  parts = [(x, x) if rows is None else _take(x, rows) for x, rows in zip(xs, kept, strict=True)]
  ys = branch(tuple(taken for taken, _ in parts))
  return tuple(_put_back(*part, y, rows) for part, y, rows in zip(parts, ys, kept, strict=True))


def _put_back(taken: Array, rest: Array, y: Array, rows: Int[Array, "groups m"] | None) -> Float[Array, "B T D"]:
  if rows is None:
    return taken + y
  return _put(rest, taken + (y * (rest.shape[0] / rows.size)).astype(taken.dtype), rows)


# Taking rows of x and putting others in their place. The gradient of x is that of the result with the gradient of the
# taken rows in their place, too: as JAX would add it up, these rows would first be scattered into an array of zeros.


@jax.custom_vjp
def _take(x: Float[Array, "B T D"], kept: Int[Array, "groups m"]) -> tuple[Array, Array]:
  """The rows that are kept [groups * m, T, D], and x for `_put` alone, as its gradient leaves these rows out."""
  return _rows(x, kept), x


@jax.custom_vjp
def _put(rest: Float[Array, "B T D"], rows: Float[Array, "groups*m T D"], kept: Int[Array, "groups m"]) -> Array:
  """What `_take` left, with these rows instead of those it took [B, T, D]."""
  return _with_rows(rest, rows, kept)


_take.defvjp(lambda x, kept: (_take(x, kept), kept), lambda kept, by: (_with_rows(by[1], by[0], kept), None))
_put.defvjp(lambda *inputs: (_put(*inputs), inputs[2]), lambda kept, by: (by, _rows(by, kept), None))


def _rows(x: Float[Array, "B T D"], kept: Int[Array, "groups m"]) -> Float[Array, "groups*m T D"]:
  grouped = x.reshape(kept.shape[0], -1, *x.shape[1:])  # [groups, rows, T, D]
  # Group by group, here and below: indexed over all groups at once, tokens would move between devices.
  chosen = jax.vmap(lambda x, which: x.at[which].get(**_WHERE))(grouped, kept)  # [groups, m, T, D]
  chosen = nn.with_logical_constraint(chosen, ("batch", None, None, "width"))
  return chosen.reshape(kept.size, *x.shape[1:])


def _with_rows(
  x: Float[Array, "B T D"], rows: Float[Array, "groups*m T D"], kept: Int[Array, "groups m"]
) -> Float[Array, "B T D"]:
  grouped = x.reshape(kept.shape[0], -1, *x.shape[1:])  # [groups, rows, T, D]
  rows = rows.reshape(*kept.shape, *x.shape[1:])  # [groups, m, T, D]
  put = jax.vmap(lambda x, rows, which: x.at[which].set(rows, **_WHERE))
  return put(grouped, rows, kept).reshape(x.shape)
