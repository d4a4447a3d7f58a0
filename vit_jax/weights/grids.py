"""Which grid a table of learned positions has: a file says how many rows it has, not what is where."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from vit_jax.models import PositionTable
from vit_jax.weights.errors import WeightsError

_LISTED = 6  # possible grids in an error


class ImageSize(NamedTuple):
  """Height and width in pixels of the images whose patches a table has the positions of."""

  height: int
  width: int


Grid = tuple[int, int]  # rows, columns
Given = PositionTable | ImageSize | Grid | None  # what whoever opens a file says of its table


def find_table(
  rows: int, readings: Mapping[str, int], patch_size: int, *, given: Given, said: ImageSize | None, **how: Any
) -> PositionTable:
  """The table of positions of a file.

  Two readings of a file are never weighed against each other: 225 rows are 14 x 16 patches and a class token, or
  15 x 15 patches. Only a square grid that is the one possible is taken without being told.

  Args:
    rows: of the table.
    readings: how many of them can be of tokens before the patches, by `PositionTable.prefix`; first the reading in
      which every token there has one.
    patch_size: pixels of a side of a patch.
    given: by whoever opens the file; of a whole table everything but `prefix`, which the number of rows decides.
    said: by a configuration beside it; passed over where it contradicts the table, as with one that was resized since.
    **how: the table is resized.

  Raises:
    WeightsError: if the grid is not certain, or the given one does not fit; lists what is possible.
  """
  for grid in (_grid(given, patch_size), _grid(said, patch_size)):
    fitting = [prefix for prefix, count in readings.items() if grid and rows - count == grid[0] * grid[1]]
    if fitting and grid and isinstance(given, PositionTable):
      return dataclasses.replace(given, prefix=fitting[0])
    if fitting:
      return PositionTable(grid, prefix=fitting[0], **how)
    if grid and given is not None:
      raise WeightsError(f"{_named(given, grid)} does not fit {rows} positions: {_possible(rows, readings)}.")
  first, *others = readings
  square = {prefix: grids(rows - count)[:1] for prefix, count in readings.items() if is_square(rows - count)}
  if first in square and not any(other in square for other in others):
    return PositionTable(square[first][0], prefix=first, **how)
  if len(square) == 1 and not any(grids(rows - readings[other]) for other in readings if other not in square):
    prefix, found = square.popitem()
    return PositionTable(found[0], prefix=prefix, **how)
  raise WeightsError(
    f"the {rows} learned positions do not say of which grid they are: {_possible(rows, readings)}. Give the height and "
    "width in pixels of the images that they are for: load_model(path, image_size=(H, W)), or --image_size=HxW; or "
    "position_table=(rows, columns)."
  )


def with_grid(table: PositionTable | None, given: Given, patch_size: int) -> PositionTable | None:
  """A table that a configuration describes, with the grid that is given; or the given one for the same tokens.

  Raises:
    WeightsError: if there is none to give a grid to.
  """
  if given is None:
    return table
  grid = _grid(given, patch_size)
  if table is None or table.kind != "learned":
    raise WeightsError(f"{_named(given, grid)} says the grid of a table of learned positions, which this model lacks.")
  if isinstance(given, PositionTable):
    return dataclasses.replace(given, prefix=table.prefix)
  return dataclasses.replace(table, grid=grid)


def grids(patches: int) -> list[Grid]:
  """The grids of at least two rows and columns that have so many patches, the nearest to a square first."""
  shorter = [side for side in range(2, math.isqrt(max(patches, 0)) + 1) if patches % side == 0]
  both = sorted({(a, b) for side in shorter for a, b in ((side, patches // side), (patches // side, side))})
  return sorted(both, key=lambda grid: max(grid) / min(grid))


def is_square(patches: int) -> bool:
  """Whether so many patches can be as many rows as columns."""
  return patches > 0 and math.isqrt(patches) ** 2 == patches


def _grid(size: Given, patch_size: int) -> Grid | None:
  if size is None:
    return None
  if isinstance(size, PositionTable):
    return size.grid
  return (size.height // patch_size, size.width // patch_size) if isinstance(size, ImageSize) else tuple(size)


def _named(given: Given, grid: Grid) -> str:
  name = f"image_size={given.height}x{given.width}" if isinstance(given, ImageSize) else "position_table"
  return f"{name} (a grid of {grid[0]} x {grid[1]} patches)"


def _possible(rows: int, readings: Mapping[str, int]) -> str:
  """The grids that so many rows can be of, for people."""
  parts = []
  for prefix, count in readings.items():
    named = {"none": "without positions of other tokens", "cls": "with one of the class token"}.get(prefix)
    named = named or f"with {count} of the tokens before the patches"
    found = [f"{height} x {width}" for height, width in grids(rows - count)]
    some = ", ".join(found[:_LISTED]) + (", …" if len(found) > _LISTED else "")
    parts.append(f"{rows - count} patches {named} ({some or 'one row or column'})")
  return " or ".join(parts)
