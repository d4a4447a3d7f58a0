"""How tokens get positions: the settings of the rotary embedding and its random training-time augmentation."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.products import batch_shards
from vit_jax.ops import rope as ops


@dataclasses.dataclass(frozen=True)
class Rope:
  """Axial rotary positions of the patches (DINOv3).

  Attributes:
    base: periods base^(4i / head_dim); None with `min_period` and `max_period` given: geometric between the two.
    normalize: divide the coordinates by "separate" height and width, or both by the "min" or "max" of them.
    shift: in training, add U(-shift, shift) to y and to x.
    jitter: in training, multiply y and x by independent exp U(-ln jitter, ln jitter).
    rescale: in training, multiply both by one exp U(-ln rescale, ln rescale).
    dtype: of the tables and of the rotation: "float32" (published models), "bfloat16" (the reference's training).
  """

  base: float | None = 100.0
  min_period: float | None = None
  max_period: float | None = None
  normalize: str = "separate"
  shift: float | None = None
  jitter: float | None = None
  rescale: float | None = None
  dtype: str = "float32"

  @property
  def augmented(self) -> bool:
    """Whether training draws random coordinates."""
    return any(value is not None for value in (self.shift, self.jitter, self.rescale))


@flax.struct.dataclass
class RopeDraws:
  """One draw of the coordinate augmentation per block (L) and loss group (G); None where the augmentation is off."""

  shift: Float[Array, "L G 2"] | None = None
  log_jitter: Float[Array, "L G 2"] | None = None
  log_rescale: Float[Array, "L G 1"] | None = None


def draw_rope(key: jax.Array, rope: Rope, depth: int, groups: int = 1) -> RopeDraws:
  """Independent draws for every block and loss group; one draw serves all images of a group at a resolution."""
  keys = jax.random.split(key, 3)

  def uniform(k: jax.Array, limit: float | None, size: int) -> Array | None:
    return None if limit is None else jax.random.uniform(k, (depth, groups, size), minval=-limit, maxval=limit)

  log = lambda value: None if value is None else math.log(value)  # noqa: E731
  return RopeDraws(
    shift=uniform(keys[0], rope.shift, 2),
    log_jitter=uniform(keys[1], log(rope.jitter), 2),
    log_rescale=uniform(keys[2], log(rope.rescale), 1),
  )


def rope_periods(rope: Rope, head_dim: int) -> Float[Array, " n"]:
  """The n = head_dim / 4 rotary periods."""
  return ops.periods(head_dim, base=rope.base, min_period=rope.min_period, max_period=rope.max_period, dtype=rope.dtype)


def rope_tables(
  rope: Rope, grid: tuple[int, int], head_dim: int, draws: RopeDraws | None = None
) -> tuple[Float[Array, "... N d"], Float[Array, "... N d"]]:
  """(sin, cos) tables of a grid: [N, d], or with `draws` [L, G, N, d]; [L, N, d] of a single group, for all rows."""
  period = rope_periods(rope, head_dim)
  coords = ops.coordinates(*grid, normalize=rope.normalize, dtype=rope.dtype)  # [N, 2]
  if draws is None:
    return ops.tables(coords, period, dtype=rope.dtype)

  def one(d: RopeDraws) -> tuple[jax.Array, jax.Array]:
    moved = ops.augment(coords, shift=d.shift, log_jitter=d.log_jitter, log_rescale=d.log_rescale, dtype=rope.dtype)
    return ops.tables(moved.astype(jnp.promote_types(moved.dtype, jnp.float32)), period, dtype=rope.dtype)

  groups = {leaf.shape[1] for leaf in jax.tree.leaves(draws)}
  if groups == {1}:
    return jax.vmap(one)(jax.tree.map(lambda leaf: leaf[:, 0], draws))
  shards = batch_shards()
  named = (None, "batch" if all(size % shards == 0 for size in groups) else None, None, None)
  return jax.tree.map(lambda table: nn.with_logical_constraint(table, named), jax.vmap(jax.vmap(one))(draws))
