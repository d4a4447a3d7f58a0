"""One loss group of a batch, as a pure function of (source, views, seed, number of the group).

The training stream is an endless row of loss groups; a batch is the next few of them. Group `n` of size g holds the
elements n g … n g + g - 1 of the shuffled stream of records. Nothing else decides what is in it, neither the batch
size nor who computes it, so that any group can be made at any time, anywhere, and be the same bit for bit. Only where
the crops have several resolutions does the batch matter, whose groups all have the same one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from vit_jax.data.decode import BadImage, decode
from vit_jax.data.limits import limits_of
from vit_jax.data.order import make_order
from vit_jax.data.reading import Reader, Stalled
from vit_jax.data.sources import Source
from vit_jax.data.views.base import Drawn, Record, Views

BAD = "bad_records"  # key of the unreadable records that a group has met
_REPLACEMENTS = 100  # images tried in the place of an unreadable one
_NEAR = 10  # of these, before one from farther away: all that is at hand may be damaged
_CROPS, _MASKS, _REPLACE, _RESOLUTION = range(4)  # what a random stream is for

T = TypeVar("T")


class Unreadable(RuntimeError):
  """There are more unreadable images than a run can do without; the message names some."""


class LossGroups:
  """`groups[n]` -> the arrays of loss group `n`.

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
    self._shares = np.cumsum(views.shares)
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
    shapes = v.arrays(size)
    group: dict[str, np.ndarray | str] = {}
    bad: list[dict[str, str]] = []
    for row, (element, record) in enumerate(self._elements(number, size)):
      arrays, _ = self._readable(element, record, v, v.example, bad)
      for name, array in arrays.items():
        group.setdefault(name, np.empty(*shapes[name]))[row] = array
    group |= v.group(_generator(self._seed, _MASKS, number), size)
    group[BAD] = json.dumps(bad)
    return group

  def drawn(self, number: int, images: int) -> list[tuple[str, Drawn]]:
    """The names of the first few images of `self[number]`, and what is drawn for each, in words."""
    v = self.views(number // self._groups_per_batch)
    found = []
    for element, record in self._elements(number, min(images, self._group_size)):
      drawn, record = self._readable(element, record, v, v.drawn, [])
      found.append((self._source.describe(record), drawn))
    return found

  def _elements(self, number: int, images: int) -> list[tuple[int, int]]:
    """(element of the stream, record) of the first images of a group."""
    elements = number * self._group_size + np.arange(images)
    return list(zip(elements.tolist(), self.order(elements).tolist(), strict=True))

  def _readable(
    self,
    element: int,
    record: int,
    views: Views,
    make: Callable[[Record, np.random.Generator], T],
    bad: list[dict[str, str]],
  ) -> tuple[T, int]:
    """What `make` makes of a record, or of the first usable one of those drawn in its place; and which that is."""
    rng = None
    for attempt in range(_REPLACEMENTS):
      try:
        return make(self._decoded(record, views), _generator(self._seed, _CROPS, element)), record
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

  def _decoded(self, record: int, views: Views) -> Record:
    """A record with its image decoded."""
    try:
      entry = self._reader[record]
      return {**entry, "image": decode(entry["image"], **views.decoding, limits=self._limits)}  # [H, W, C]
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
