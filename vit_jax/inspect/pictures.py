"""Pictures of what a model is shown and of what it sees: sheets of crops and masks, principal components of patches.

Everything returns uint8 [height, width, 3]; `save` writes a file. NumPy and PIL only. Of images of other channels than
RGB the first three are shown as red, green and blue, of two the first one.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from vit_jax.data.views.base import Panel
from vit_jax.inspect.pca import foreground_mask, principal_colours
from vit_jax.models import ConvNeXt, VisionTransformer
from vit_jax.models.inputs import prepare_images
from vit_jax.parallel import processes

Picture = UInt8[np.ndarray, "height width 3"]

_GAP, _HEADER, _FONT = 6, 24, 14
_PAPER, _INK = 255, (60, 66, 74)
_HIDDEN = np.array([128.0, 128.0, 128.0])  # a masked patch is mostly this grey …
_HIDING = 0.85  # … by this share


def contact_sheet(
  panels: Sequence[Panel],
  *,
  images: int = 8,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  min_side: int = 112,
) -> Picture:
  """Some images of a batch, one a row, as its views show them; masked patches are greyed.

  The name above a column says how many pixels the crops have; they may be shown enlarged.

  Args:
    panels: of a batch, see `data.views`.
    images: rows of the sheet, at most.
    mean: of the normalisation, to undo it when the crops are floating-point.
    std: likewise.
    min_side: small crops are enlarged, all by the same whole factor, until those of the first panel have this height.
  """
  shown = [shown_panel(panel._replace(images=panel.images[:images]), mean, std) for panel in panels]  # [b, K, H, W, 3]
  factor = max(1, math.ceil(min_side / shown[0].shape[2]))
  shown = [_enlarge(crops, factor) for crops in shown]
  rows: list[list[Picture]] = [[] for _ in shown[0]]
  names: list[str] = []
  for panel, crops in zip(panels, shown, strict=True):
    side, count = panel.images.shape[-2], crops.shape[1]
    together = 1
    if panel.stacked:  # as many above each other as are no higher than what is there
      highest = max((picture.shape[0] for picture in rows[0]), default=crops.shape[2])
      together = max(1, (highest + _GAP) // (crops.shape[2] + _GAP))
      names.append(f"{panel.name} crops ({count}), {side}")
    else:
      names += [f"{panel.name} {i + 1}, {side}" for i in range(count)]
    for row, mine in zip(rows, crops, strict=True):
      row += [_column(mine[i : i + together]) for i in range(0, count, together)]
  return _sheet(rows, names)


def shown_panel(
  panel: Panel, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> UInt8[np.ndarray, "B K H W 3"]:
  """The images of a panel as a person sees them: RGB, not normalised, masked patches greyed."""
  crops = visible(panel.images, mean, std)
  return crops if panel.masks is None else overlay_masks(crops, np.asarray(panel.masks[: len(crops)]))


def stacked(sheets: Sequence[Picture]) -> Picture:
  """Sheets above each other."""
  width = max(sheet.shape[1] for sheet in sheets)
  return np.concatenate(
    [np.pad(sheet, ((0, 0), (0, width - sheet.shape[1]), (0, 0)), constant_values=_PAPER) for sheet in sheets]
  )


def overlay_masks(crops: UInt8[np.ndarray, "B G H W 3"], masks: Bool[np.ndarray, "B G N"]) -> np.ndarray:
  """Greys the masked patches of crops; every other pixel stays as it is.

  Raises:
    ValueError: if N square patches do not tile the crops.
  """
  height, width = crops.shape[2:4]
  side = math.isqrt(height * width // masks.shape[-1])
  if height % side or width % side or (height // side) * (width // side) != masks.shape[-1]:
    raise ValueError(f"masks of {masks.shape[-1]} square patches do not tile crops of {height}x{width} pixels.")
  cells = masks.reshape(*masks.shape[:2], height // side, width // side)
  hidden = cells.repeat(side, axis=-2).repeat(side, axis=-1)  # [B, G, H, W]
  greyed = (_HIDING * _HIDDEN + (1 - _HIDING) * crops).round().astype(np.uint8)
  return np.where(hidden[..., None], greyed, crops)


def pca_sheet(
  images: UInt8[np.ndarray, "B H W 3"],
  patches: Float[np.ndarray, "B N D"],
  grid: tuple[int, int],
  *,
  foreground: bool = False,
  per_row: int = 2,
  min_side: int = 160,
) -> Picture:
  """Images next to the first three principal components of their patch features, shown as red, green and blue.

  Like colours mean like features. "shared" takes the components among all images: the same colour is the same feature
  in every image; "own" computes them within each image, which shows finer parts.

  Args:
    images: the pictures.
    patches: features of their patches, row-major.
    grid: rows and columns of patches, N = rows x columns.
    foreground: split the patches by the first component, and colour only those that are not mostly at the border.
    per_row: images side by side.
    min_side: pictures are enlarged to at least this height.
  """
  patches = np.asarray(patches, np.float32)
  if patches.shape[1] != grid[0] * grid[1] or len(patches) != len(images):
    raise ValueError(f"{patches.shape} patches do not fit {len(images)} images with a grid of {grid[0]}x{grid[1]}.")
  size = _shown_size(images.shape[1:3], min_side)
  keep = foreground_mask(patches, grid) if foreground else None
  shared = principal_colours(patches.reshape(-1, patches.shape[-1]), None if keep is None else keep.reshape(-1))
  shared = shared.reshape(*patches.shape[:2], 3)
  cells = []
  for i, image in enumerate(images):
    own = principal_colours(patches[i], None if keep is None else keep[i])
    maps = [
      Image.fromarray(colours.reshape(*grid, 3)).resize(size, Image.Resampling.NEAREST) for colours in (shared[i], own)
    ]
    photo = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    cells.append([np.asarray(picture) for picture in (photo, *maps)])
  per_row = min(per_row, len(cells))
  rows = [sum(cells[i : i + per_row], []) for i in range(0, len(cells), per_row)]
  return _sheet(rows, ["image", "features, shared", "features, own"] * per_row)


def feature_sheet(
  model: VisionTransformer | ConvNeXt,
  params: Any,
  images: UInt8[np.ndarray, "B H W C"],
  *,
  mean: Sequence[float],
  std: Sequence[float],
  foreground: bool = False,
  mesh: jax.sharding.Mesh | None = None,
) -> Picture:
  """`pca_sheet` of what a backbone makes of images: height and width must be multiples of its stride.

  Larger images give finer maps: rotary positions accept any size. Parameters that are spread over a `mesh` of several
  processes need all of them to take part.
  """
  images = np.asarray(images)
  grid = images.shape[1] // model.stride, images.shape[2] // model.stride
  arguments = model, tuple(mean), tuple(std), mesh, params, images
  processes.compile_together("patches", _patches, *arguments)
  patches = _patches(*arguments)
  return pca_sheet(visible(images), np.asarray(patches, np.float32), grid, foreground=foreground)


def save(picture: Picture, path: str | os.PathLike) -> Path:
  """Writes a picture (the ending of `path` chooses the format) and returns where it is."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(picture).save(path)
  return path


def visible(
  crops: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> UInt8[np.ndarray, "... H W 3"]:
  """Crops of any number of channels, and normalised where they are floating-point, as pictures."""
  crops = to_uint8(np.asarray(crops), mean, std)
  return crops[..., :3] if crops.shape[-1] >= 3 else np.repeat(crops[..., :1], 3, axis=-1)


def to_uint8(crops: np.ndarray, mean: Sequence[float] | None, std: Sequence[float] | None) -> np.ndarray:
  """Pixels as they were before normalisation; uint8 crops are returned as they are.

  Raises:
    ValueError: if floating-point crops come without mean and std.
  """
  if crops.dtype == np.uint8:
    return crops
  if mean is None or std is None:
    raise ValueError("floating-point crops need the mean and std of their normalisation (augment.mean, augment.std).")
  pixels = (crops.astype(np.float32) * np.asarray(std, np.float32) + np.asarray(mean, np.float32)) * 255
  return pixels.round().clip(0, 255).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _patches(
  model: VisionTransformer | ConvNeXt,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  mesh: jax.sharding.Mesh | None,
  params: Any,
  images: Array,
) -> Float[Array, "B N D"]:
  patches = model.apply({"params": params}, prepare_images(model, images, mean, std)).patches
  if mesh is None:
    return patches
  return jax.lax.with_sharding_constraint(patches, jax.sharding.NamedSharding(mesh, jax.P()))  # whole on every device


def _enlarge(crops: np.ndarray, factor: int) -> np.ndarray:
  return crops.repeat(factor, axis=-3).repeat(factor, axis=-2)


def _shown_size(shape: tuple[int, int], min_side: int) -> tuple[int, int]:
  factor = max(1, math.ceil(min_side / shape[0]))
  return shape[1] * factor, shape[0] * factor  # PIL: width first


def _column(pictures: np.ndarray) -> np.ndarray:
  """Pictures of one size above each other."""
  count, height, width = pictures.shape[:3]
  column = np.full((count * (height + _GAP) - _GAP, width, 3), _PAPER, np.uint8)
  for i, picture in enumerate(pictures):
    column[i * (height + _GAP) : i * (height + _GAP) + height] = picture
  return column


def _sheet(rows: Sequence[Sequence[np.ndarray]], names: Sequence[str]) -> Picture:
  """Pictures in rows; every column is as wide as its first picture and has its name above it."""
  widths = [picture.shape[1] for picture in rows[0]]
  heights = [max(picture.shape[0] for picture in row) for row in rows]
  lefts = np.cumsum([_GAP, *(w + _GAP for w in widths)])
  tops = np.cumsum([_HEADER, *(h + _GAP for h in heights)])
  font = ImageFont.load_default(_FONT)
  right = max([int(lefts[-1]), *(int(left + font.getlength(n)) + _GAP for left, n in zip(lefts, names, strict=False))])
  sheet = Image.new("RGB", (right, int(tops[-1])), (_PAPER,) * 3)
  draw = ImageDraw.Draw(sheet)
  for left, name in zip(lefts, names, strict=False):
    draw.text((int(left), _HEADER / 2), name, fill=_INK, font=font, anchor="lm")
  for top, row in zip(tops, rows, strict=False):
    for left, picture in zip(lefts, row, strict=False):
      sheet.paste(Image.fromarray(picture), (int(left), int(top)))
  return np.asarray(sheet)
