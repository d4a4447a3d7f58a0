"""Masks of the global crops: block masks with exact quotas for a loss group, as in iBOT and DINOv2.

How many patches each row masks is fixed by (rows, patches, probability, ratio); only which crop gets which quota and
which patches are hidden is random. So the number of masked patches of a loss group is a constant, and every array made
from the masks has a static shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from vit_jax.data.views.multi_crop.parameters import NUM_GLOBAL

_MIN_BLOCK = 4  # patches: the least area that is drawn for a block
_LOG_ASPECT = math.log(0.3)  # a block's aspect ratio is log-uniform in [0.3, 1 / 0.3]
_TRIES = 10  # proposals for one block before the rest is filled patch by patch


def mask_counts(rows: int, patches: int, probability: float, ratio: tuple[float, float]) -> Int[np.ndarray, " rows"]:
  """Masked patches of each of `rows` global crops, before the rows are shuffled.

  `int(rows * probability)` rows are masked; the i-th masks the share `ratio[0] + (i + 1) / n * (ratio[1] - ratio[0])`
  of the patches, rounded down: an even spread over (low, high] that always contains the highest. In float32, as the
  reference computes it, and with its rounding: else some quotas would differ by one patch.
  """
  masked = int(rows * probability)
  shares = _linspace_float32(*ratio, masked + 1)[1:]  # [masked]
  counts = np.zeros(rows, np.int64)
  counts[:masked] = (np.float32(patches) * shares).astype(np.int64)  # rounded down
  return counts


def _linspace_float32(start: float, stop: float, num: int) -> Float32[np.ndarray, " num"]:
  """Evenly spaced float32 numbers, bit for bit those of torch.linspace (NumPy's differ: its steps are float64).

  Both ends count towards the middle with one float32 step, and each number is rounded once, as by a fused
  multiply-add: the product of float32 numbers is exact in float64.
  """
  if num == 1:
    return np.array([start], np.float32)
  low, high = np.float32(start), np.float32(stop)
  step = np.float64((high - low) / np.float32(num - 1))
  index = np.arange(num)
  return np.where(index < num // 2, low + step * index, high - step * (num - 1 - index)).astype(np.float32)


def masked_patches(group_size: int, grid: tuple[int, int], probability: float, ratio: tuple[float, float]) -> int:
  """M, the constant number of masked patches of a loss group of `group_size` images (two global crops each)."""
  return int(mask_counts(NUM_GLOBAL * group_size, grid[0] * grid[1], probability, ratio).sum())


def block_mask(rng: np.random.Generator, grid: tuple[int, int], count: int) -> Bool[np.ndarray, "h w"]:
  """A mask with exactly `count` True patches: overlapping random rectangles, then single patches to fill the quota.

  A rectangle has at least about 4 patches and at most half of the grid, never spans a whole side, and never covers
  more new patches than are still to be masked.
  """
  height, width = grid
  if not 0 <= count <= height * width:
    raise ValueError(f"cannot mask {count} of the {height * width} patches of a {height} x {width} grid.")
  cells, _ = _cover(_uniforms(rng), height, width, count)
  packed = np.frombuffer(cells.to_bytes((height * width + 7) // 8, "little"), np.uint8)
  mask = np.unpackbits(packed, count=height * width, bitorder="little").view(bool)  # [h * w]
  missing = count - cells.bit_count()
  if missing:
    mask[rng.choice(np.flatnonzero(~mask), missing, replace=False)] = True
  return mask.reshape(height, width)


def _cover(uniform: Iterator[float], height: int, width: int, count: int) -> tuple[int, int]:
  """Covers up to `count` patches with rectangles: (the patches as bits of an integer, number of rectangles).

  Bit `row * width + column` stands for a patch: a rectangle is tested and added with a few integer operations, which
  is several times faster than slicing small arrays.
  """
  max_block = (height // 2) * width
  cells, blocks = 0, 0
  while cells.bit_count() < count:
    limit = min(count - cells.bit_count(), max_block)
    for _ in range(_TRIES):
      area = _MIN_BLOCK + next(uniform) * (limit - _MIN_BLOCK)  # meant for limit < 4 too: then between the two
      aspect = math.exp(_LOG_ASPECT - 2.0 * _LOG_ASPECT * next(uniform))
      block_height, block_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if block_width >= width or block_height >= height:
        continue
      top = int(next(uniform) * (height - block_height + 1))
      left = int(next(uniform) * (width - block_width + 1))
      block = 0
      for row in range(top, top + block_height):
        block |= ((1 << block_width) - 1) << (row * width + left)
      if 0 < (block & ~cells).bit_count() <= limit:
        cells |= block
        blocks += 1
        break
    else:
      break
  return cells, blocks


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
  """An endless stream of uniform numbers, drawn in chunks: one call per number would cost more than the mask."""
  while True:
    yield from rng.random(64).tolist()


def group_masks(
  rng: np.random.Generator,
  group_size: int,
  grid: tuple[int, int],
  probability: float,
  ratio: tuple[float, float],
  *,
  shift: bool = False,
) -> Bool[np.ndarray, "images 2 patches"]:
  """Masks of the two global crops of each image of a loss group; a crop is masked independently of its sibling.

  Args:
    rng: draws everything; the same state gives the same masks.
    group_size: images of the group.
    grid: patches (rows, columns) of a global crop.
    probability: share of the crops that are masked.
    ratio: masked share of the patches, evenly spread over this range.
    shift: roll each mask by an independent random offset per axis, around the edges.
  """
  height, width = grid
  masks = np.zeros((NUM_GLOBAL * group_size, height, width), bool)  # [2g, h, w]
  counts = mask_counts(NUM_GLOBAL * group_size, height * width, probability, ratio)  # [2g]
  for row, count in zip(rng.permutation(NUM_GLOBAL * group_size), counts, strict=True):
    if count == 0:
      continue
    mask = block_mask(rng, grid, int(count))
    if shift:
      mask = np.roll(mask, (int(rng.integers(height)), int(rng.integers(width))), axis=(0, 1))
    masks[row] = mask
  return masks.reshape(group_size, NUM_GLOBAL, height * width)


def indices_and_weights(
  masks: Bool[np.ndarray, "images 2 patches"],
) -> tuple[Int32[np.ndarray, " M"], Float32[np.ndarray, " M"]]:
  """Flat positions of a group's masked patches (image, then crop, then patch) and 1 / masked patches of the crop."""
  flat = np.flatnonzero(masks)  # [M]
  per_crop = masks.reshape(-1, masks.shape[-1]).sum(axis=1)  # [2g]
  weights = np.float32(1.0) / per_crop[flat // masks.shape[-1]].astype(np.float32)  # [M]
  return flat.astype(np.int32), weights
