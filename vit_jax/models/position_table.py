"""Absolute positions, added to the tokens before the first block: a learned table or fixed sines and cosines."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_jax.ops.resize import resize_map


@dataclasses.dataclass(frozen=True)
class PositionTable:
  """How a model's absolute positions are kept and brought to the grid of an image.

  Attributes:
    grid: (rows, columns) of the table; images of another grid get it resized (bicubic, as PyTorch does it).
    kind: "learned", or "sincos": sines and cosines of the coordinates (MAE, He et al. 2022), no parameter, any grid.
    prefix: which tokens before the patches have learned positions too: "none", "cls", "all" (class token, registers).
    antialias: resize with antialiasing (DINOv2 with registers, timm) or without (DINOv2, Hugging Face).
    offset: added to the new grid in the scale of the resizing: 0.1 in the DINOv2 repository, without registers.
  """

  grid: tuple[int, int] = (14, 14)
  kind: str = "learned"
  prefix: str = "cls"
  antialias: bool = False
  offset: float = 0.0

  def __post_init__(self) -> None:
    object.__setattr__(self, "grid", tuple(self.grid))  # lists, as JSON has them, are no hashable attribute
    if self.kind not in ("learned", "sincos"):
      raise ValueError(f'position_table.kind must be "learned" or "sincos", got {self.kind!r}.')
    if self.prefix not in ("none", "cls", "all"):
      raise ValueError(f'position_table.prefix must be "none", "cls" or "all", got {self.prefix!r}.')

  def prefix_length(self, class_token: bool, num_registers: int) -> int:
    """How many tokens before the patches have a learned position."""
    return {"none": 0, "cls": int(class_token), "all": int(class_token) + num_registers}[self.prefix]

  def resize(self, patches: Float[Array, "N D"], grid: tuple[int, int]) -> Float[Array, "n D"]:
    """The learned positions of the patches of a grid, in float32 at least."""
    if grid == self.grid:
      return patches
    table = patches.reshape(1, *self.grid, -1)  # [1, rows, columns, D]
    return resize_map(table, grid, antialias=self.antialias, offset=self.offset).reshape(grid[0] * grid[1], -1)


def sincos_positions(grid: tuple[int, int], width: int) -> Float[np.ndarray, "N D"]:
  """Fixed positions of a grid: sin and cos of the column, then of the row, at D / 4 frequencies from 1 to 1e-4.

  Raises:
    ValueError: if the width is not a multiple of 4.
  """
  if width % 4:
    raise ValueError(f"sincos positions need a width that is a multiple of 4, got {width}.")
  frequency = 10_000.0 ** (-np.arange(width // 4) / (width // 4))  # [D/4]
  rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
  angles = [axis.reshape(-1, 1) * frequency for axis in (columns, rows)]  # 2 x [N, D/4]
  return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)


def place(front: Float[Array, "P D"], patches: Float[Array, "N D"], prefix: int) -> Float[Array, "T D"]:
  """Positions of all tokens: those of the first ones, none for the rest of the `prefix` tokens, those of patches."""
  silent = jnp.zeros((prefix - front.shape[0], patches.shape[1]), patches.dtype)
  return jnp.concatenate([front.astype(patches.dtype), silent, patches])
