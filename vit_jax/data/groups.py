"""One loss group of a batch, as a pure function of (source, views, seed, number of the group).

The training stream is an endless row of loss groups; a batch is the next few of them. Group `n` of size g holds the
elements n g … n g + g - 1 of the shuffled stream of records. Nothing else decides what is in it, neither the batch
size nor who computes it, so that any group can be made at any time, anywhere, and be the same bit for bit.
"""

from __future__ import annotations

import json
import logging

import grain
import numpy as np

from vit_jax.data.augment import multi_crop
from vit_jax.data.decode import BadImage, decode
from vit_jax.data.masks import group_masks, indices_and_weights
from vit_jax.data.sources import Source
from vit_jax.data.views import Views

log = logging.getLogger(__name__)

BAD = "bad_records"  # key of the unreadable records that a group has met
_REPLACEMENTS = 100  # images tried in the place of an unreadable one
_CROPS, _MASKS, _REPLACE = range(3)  # what a random stream is for


class LossGroups:
  """`groups[n]` -> the arrays of loss group `n` (its masks' indices and weights with a leading axis of 1).

  The records come in epochs: a fresh permutation of all of them for each, the next epoch beginning in the middle of a
  group where the last one ended. So every record comes exactly once in each epoch and none is left out.
  """

  def __init__(self, source: Source, views: Views, seed: int, group_size: int):
    if len(source) == 0:
      raise ValueError("the source holds no record.")
    self._source = source
    self._views = views
    self._seed = seed
    self._group_size = group_size
    self._order = grain.MapDataset.range(len(source)).seed(seed % (1 << 32)).shuffle().repeat()

  def __getitem__(self, number: int) -> dict[str, np.ndarray | str]:
    v, size = self._views, self._group_size
    group = {
      "global_crops": np.empty((size, 2, v.global_size, v.global_size, 3), np.uint8),
      "local_crops": np.empty((size, v.local_number, v.local_size, v.local_size, 3), np.uint8),
      "label": np.empty(size, np.int32),
    }
    bad: list[dict[str, str]] = []
    for row in range(size):
      element = number * size + row
      image, group["label"][row] = self._readable(element, bad)
      rng = _generator(self._seed, _CROPS, element)
      multi_crop(image, rng, v, group["global_crops"][row], group["local_crops"][row])
    if v.mask_grid is not None:
      rng = _generator(self._seed, _MASKS, number)
      masks = group_masks(rng, size, v.mask_grid, v.mask_probability, v.mask_ratio, shift=v.mask_shift)
      indices, weights = indices_and_weights(masks)
      group |= {"masks": masks, "mask_indices": indices[None], "mask_weights": weights[None]}
    group[BAD] = json.dumps(bad)
    return group

  def _readable(self, element: int, bad: list[dict[str, str]]) -> tuple[np.ndarray, int]:
    """(image, label) of an element of the stream, or of the first readable one of its own random replacements."""
    rng = None
    record = int(self._order[element])
    for _ in range(_REPLACEMENTS):
      try:
        return self._read(record)
      except BadImage as error:
        bad.append({"record": record, "name": error.name, "reason": error.reason})
      rng = rng or _generator(self._seed, _REPLACE, element)
      record = int(rng.integers(len(self._source)))
    names = ", ".join(entry["name"] for entry in bad[-3:])
    raise RuntimeError(
      f"{_REPLACEMENTS} images in a row could not be read, the last of them {names}: {bad[-1]['reason']}. "
      "Check data.source."
    )

  def _read(self, record: int) -> tuple[np.ndarray, int]:
    try:
      entry = self._source[record]
      return decode(entry["image"], self._source.describe(record)), int(entry["label"])
    except BadImage as error:
      raise BadImage(self._source.describe(record), error.reason) from error
    except OSError as error:
      raise BadImage(self._source.describe(record), f"cannot be read ({error})") from error
    except Exception as error:
      # What reaches the caller may come out of another process, which keeps only the message.
      message = f"reading {self._source.describe(record)} failed: {type(error).__name__}: {error}"
      raise RuntimeError(message) from error


def _generator(seed: int, purpose: int, index: int) -> np.random.Generator:
  """The random stream of one element or group, independent of all others."""
  return np.random.Generator(np.random.Philox(key=(seed % (1 << 64), index * 4 + purpose)))
