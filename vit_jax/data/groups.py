"""One loss group of a batch, as a pure function of (source, views, seed, number of the group).

The training stream is an endless row of loss groups; a batch is the next few of them. Group `n` of size g holds the
elements n g … n g + g - 1 of the shuffled stream of records. Nothing else decides what is in it, neither the batch
size nor who computes it, so that any group can be made at any time, anywhere, and be the same bit for bit. Only where
the crops have several resolutions does the batch matter, whose groups all have the same one.
"""

from __future__ import annotations

import json

import numpy as np

from vit_jax.data.augment import (
  Colours,
  Crop,
  draw_colours,
  draw_crops,
  multi_crop,
  random_numbers,
  random_shape,
)
from vit_jax.data.canvas import fit_into, fitting
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.limits import limits_of
from vit_jax.data.masks import group_masks, indices_and_weights, masked_patches
from vit_jax.data.order import make_order
from vit_jax.data.reading import Reader, Stalled
from vit_jax.data.sources import Source
from vit_jax.data.views import Views

# Of batches that are augmented on the device: images on canvases, their heights and widths, random numbers, and an
# array of no elements whose shape says the sizes of the crops.
CANVAS, VALID, RANDOM, SIZES = RAW = ("canvas", "valid", "random", "sizes")
BAD = "bad_records"  # key of the unreadable records that a group has met
_REPLACEMENTS = 100  # images tried in the place of an unreadable one
_NEAR = 10  # of these, before one from farther away: all that is at hand may be damaged
_CROPS, _MASKS, _REPLACE, _RESOLUTION = range(4)  # what a random stream is for


class Unreadable(RuntimeError):
  """There are more unreadable images than a run can do without; the message names some."""


def batch_shapes(views: Views, batch_size: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Shape and type of every array of a batch of views of one resolution (`Views.variants`)."""
  v, groups = views, batch_size // views.group_size(batch_size)
  shapes = (_crop_shapes(v, batch_size) if v.canvas is None else _raw_shapes(v, batch_size)) | {
    "label": ((batch_size,), np.int32)
  }
  if v.mask_grid is not None:
    masked = masked_patches(v.group_size(batch_size), v.mask_grid, v.mask_probability, v.mask_ratio)
    shapes |= {
      "masks": ((batch_size, 2, v.mask_grid[0] * v.mask_grid[1]), np.bool_),
      "mask_indices": ((groups, masked), np.int32),
      "mask_weights": ((groups, masked), np.float32),
    }
  return {name: (shape, np.dtype(kind)) for name, (shape, kind) in shapes.items()}


def _crop_shapes(v: Views, images: int) -> dict[str, tuple[tuple[int, ...], type]]:
  shapes = {
    "global_crops": ((images, 2, v.global_size, v.global_size, v.channels), np.uint8),
    "local_crops": ((images, v.local_number, v.local_size, v.local_size, v.channels), np.uint8),
  }
  if v.gram_size is not None:
    shapes["gram_crops"] = ((images, 2, v.gram_size, v.gram_size, v.channels), np.uint8)
  return shapes


def _raw_shapes(v: Views, images: int) -> dict[str, tuple[tuple[int, ...], type]]:
  return {
    CANVAS: ((images, *v.canvas, v.channels), np.uint8),
    VALID: ((images, 2), np.int32),
    RANDOM: ((images, *random_shape(v)), np.float32),
    SIZES: ((0, *crop_sizes(v)), np.uint8),
  }


def crop_sizes(views: Views) -> tuple[int, int, int]:
  """Sides of global, local and gram crops (0: none) of views of one resolution."""
  return views.global_size, views.local_size, views.gram_size or 0


class LossGroups:
  """`groups[n]` -> the arrays of loss group `n` (its masks' indices and weights with a leading axis of 1).

  The records come in epochs: a fresh permutation of all of them for each, the next epoch beginning in the middle of a
  group where the last one ended. So every record comes exactly once in each epoch and none is left out.
  """

  def __init__(
    self,
    source: Source,
    views: Views,
    seed: int,
    group_size: int,
    groups_per_batch: int = 1,
    *,
    timeout: float | None = None,
  ):
    if len(source) == 0:
      raise ValueError("the source holds no record.")
    self._source = source
    self._reader = Reader(source, timeout)
    self._limits = limits_of(source)
    self._variants = views.variants()
    self._shares = np.cumsum([size.probability for size in views.resolutions])
    self._seed = seed
    self.order = make_order(source, seed)
    self._group_size = group_size
    self._groups_per_batch = groups_per_batch

  def views(self, batch: int) -> Views:
    """What the crops of a batch (the first is 0) are: its resolution is drawn from the seed and its number alone."""
    if len(self._variants) == 1:
      return self._variants[0]
    share = _generator(self._seed, _RESOLUTION, batch).random() * self._shares[-1]
    return self._variants[int(np.searchsorted(self._shares, share, side="right"))]

  def __getitem__(self, number: int) -> dict[str, np.ndarray | str]:
    v, size = self.views(number // self._groups_per_batch), self._group_size
    shapes = batch_shapes(v, size)
    crops = ("global_crops", "local_crops", "gram_crops")
    group = {name: np.empty(*shapes[name]) for name in (*crops, *RAW, "label") if name in shapes}
    bad: list[dict[str, str]] = []
    elements = number * size + np.arange(size)
    records = self.order(elements)
    for row, (element, record) in enumerate(zip(elements.tolist(), records.tolist(), strict=True)):
      image, group["label"][row], _ = self._readable(element, record, v, bad)
      rng = _generator(self._seed, _CROPS, element)
      if v.canvas is None:
        multi_crop(image, rng, v, *(group[name][row] for name in crops if name in group))
      else:
        group[VALID][row] = fit_into(group[CANVAS][row], image)
        group[RANDOM][row] = random_numbers(rng, v)
    if v.mask_grid is not None:
      rng = _generator(self._seed, _MASKS, number)
      masks = group_masks(rng, size, v.mask_grid, v.mask_probability, v.mask_ratio, shift=v.mask_shift)
      indices, weights = indices_and_weights(masks)
      group |= {"masks": masks, "mask_indices": indices[None], "mask_weights": weights[None]}
    group[BAD] = json.dumps(bad)
    return group

  def drawn(self, number: int, images: int) -> list[tuple[str, tuple[int, int], list[Crop], Colours | None]]:
    """What `self[number]` makes of its first few images, in words.

    Returns:
      For each image: its name, the height and width it is cropped from, what is drawn for its crops, global ones first,
      and the colours shared by all of them with `share_color_jitter`.
    """
    v = self.views(number // self._groups_per_batch)
    elements = number * self._group_size + np.arange(min(images, self._group_size))
    found = []
    for element, record in zip(elements.tolist(), self.order(elements).tolist(), strict=True):
      image, _, record = self._readable(element, record, v, [])
      rng = _generator(self._seed, _CROPS, element)
      size = image.shape[:2] if v.canvas is None else fitting(image.shape[:2], v.canvas)
      crops = draw_crops(rng, *size, v)
      colours = draw_colours(rng, v) if v.share_color_jitter else None
      found.append((self._source.describe(record), size, crops, colours))
    return found

  def _readable(
    self, element: int, record: int, views: Views, bad: list[dict[str, str]]
  ) -> tuple[np.ndarray, int, int]:
    """(image, label, record) of a record, or of the first readable one of those drawn in its place."""
    rng = None
    for attempt in range(_REPLACEMENTS):
      try:
        return *self._read(record, views), record
      except BadImage as error:
        bad.append({"record": record, "name": error.name, "reason": error.reason})
      rng = rng or _generator(self._seed, _REPLACE, element)
      alternatives = self.order.alternatives(record, far=attempt >= _NEAR)
      record = alternatives[int(rng.integers(len(alternatives)))]
    names = ", ".join(entry["name"] for entry in bad[-3:])
    raise Unreadable(
      f"{_REPLACEMENTS} images in a row could not be read, the last of them {names}: {bad[-1]['reason']}. "
      "Check data.source."
    )

  def _read(self, record: int, views: Views) -> tuple[np.ndarray, int]:
    try:
      entry = self._reader[record]
      image = decode(
        entry["image"],
        enough=views.enough_pixels,
        fits=views.canvas,
        channels=views.channels,
        value_range=views.value_range,
        limits=self._limits,
      )
      return image, int(entry["label"])
    except BadImage as error:
      raise BadImage(self._source.describe(record), error.reason) from error
    except Stalled:
      raise
    except OSError as error:
      raise BadImage(self._source.describe(record), f"cannot be read ({error})") from error
    except Exception as error:
      # What reaches the caller may come out of another process, which keeps only the message.
      message = f"reading {self._source.describe(record)} failed: {type(error).__name__}: {error}"
      raise RuntimeError(message) from error


def _generator(seed: int, purpose: int, index: int) -> np.random.Generator:
  """The random stream of one element or group, independent of all others."""
  return np.random.Generator(np.random.Philox(key=(seed % (1 << 64), index * 4 + purpose)))
