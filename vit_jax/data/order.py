"""The order of the records: a fresh pseudo-random permutation for each epoch, computed entry by entry.

A Feistel network permutes the smallest range of 2^(2k) numbers that holds all records; numbers outside the records are
sent through it again until they fall inside. So any entry of any epoch costs the same small time and no memory, for a
thousand records or a billion, and every process can compute the entries that it needs. (Grain's index shuffle does the
same, at 100 microseconds an entry: a tenth of what a small image costs altogether.)

Two kinds of sources have an order of their own, by attributes that `make_order` looks for: one that is read in blocks
(`blocks`, `window`: Parquet), and one that is a mixture (`parts`, `shares`).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, UInt64

_ROUNDS = 8  # four make a good permutation of a large range; a handful of records needs more
_PARTS = 0x9E3779B9  # sets the seeds of a mixture's parts apart
_ORDER, _PERIOD, _WINDOW = range(3)  # what a seed is for


class Order(Protocol):
  """Which record each element of the endless stream is.

  Attributes:
    identity: what the order depends on besides the seed and the number of records, as JSON can hold it.
  """

  identity: dict[str, int | str]

  def __call__(self, elements: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The records of these elements."""

  def alternatives(self, record: int, *, far: bool = False) -> range:
    """The records one of which may take the place of an unreadable one; `far`: also of those that are not at hand."""


def make_order(source: Any, seed: int) -> Order:
  """The order in which a source's records come."""
  if (parts := getattr(source, "parts", None)) is not None:
    return MixedOrder([make_order(part, seed + _PARTS * (i + 1)) for i, part in enumerate(parts)], source, seed)
  if (blocks := getattr(source, "blocks", None)) is not None and len(blocks) - 1 > source.window:
    return BlockOrder(blocks, source.window, seed)
  return ShuffledOrder(len(source), seed)


class ShuffledOrder:
  """All records, in an order of its own for each epoch."""

  def __init__(self, records: int, seed: int):
    self._records, self._seed = records, seed
    self.identity: dict[str, int | str] = {}

  def __call__(self, elements: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return shuffled(elements, self._records, self._seed)

  def alternatives(self, record: int, *, far: bool = False) -> range:
    return range(self._records)


class BlockOrder:
  """All records, shuffled in two stages: the blocks among each other, the records within a window of some blocks.

  Within an epoch every record comes exactly once; a window's blocks are all that has to be at hand.
  """

  def __init__(self, blocks: Int[np.ndarray, " n"], window: int, seed: int):
    """`blocks`: the first record of each block, and the number of records; `window`: blocks of a window."""
    self._blocks, self._window, self._seed = np.asarray(blocks, np.int64), window, seed
    crc = zlib.crc32(self._blocks.tobytes())
    self.identity: dict[str, int | str] = {"blocks": f"{len(blocks) - 1} ({crc:08x}), {window} at a time"}
    self._epoch = functools.lru_cache(maxsize=4)(self._plan)

  def __reduce__(self):
    return (BlockOrder, (self._blocks, self._window, self._seed))

  def __call__(self, elements: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    epochs, entries = np.divmod(np.asarray(elements, np.int64), int(self._blocks[-1]))
    records = [self._record(int(epoch), int(entry)) for epoch, entry in zip(epochs, entries, strict=True)]
    return np.array(records, np.int64)

  def alternatives(self, record: int, *, far: bool = False) -> range:
    if far:
      return range(int(self._blocks[-1]))
    block = int(np.searchsorted(self._blocks, record, side="right")) - 1
    return range(int(self._blocks[block]), int(self._blocks[block + 1]))  # at hand already

  def _record(self, epoch: int, entry: int) -> int:
    blocks, starts = self._epoch(epoch)
    first = self._window * ((int(np.searchsorted(starts, entry, side="right")) - 1) // self._window)
    last = min(first + self._window, len(blocks))
    length = int(starts[last] - starts[first])
    seed = _seed_of(self._seed, _WINDOW, epoch, first)
    place = int(starts[first]) + int(shuffled(np.array([entry - starts[first]]), length, seed)[0])
    block = int(np.searchsorted(starts, place, side="right")) - 1
    return int(self._blocks[blocks[block]]) + place - int(starts[block])

  def _plan(self, epoch: int) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " c"]]:
    """(the blocks in the order of an epoch, the entry at which each begins, and the number of entries)."""
    count = len(self._blocks) - 1
    order = shuffled(np.arange(count) + epoch * count, count, _seed_of(self._seed, _ORDER, 0, 0))
    return order, np.concatenate([[0], np.cumsum(np.diff(self._blocks)[order])])


class MixedOrder:
  """Several sources with fixed shares: each comes in its own order, with its own epochs, at its share of the places.

  The places come in periods: in each, source s has exactly `shares[s]` places, in an order drawn for this period. So
  the k-th record of a source is known without counting, and its epochs are exact.
  """

  def __init__(self, orders: Sequence[Order], source: Any, seed: int):
    self._orders, self._seed = list(orders), seed
    self._shares = np.asarray(source.shares, np.int64)
    self._starts = np.concatenate([[0], np.cumsum([len(part) for part in source.parts])]).astype(np.int64)
    parts = [f"{share} of {len(part)}" for share, part in zip(source.shares, source.parts, strict=True)]
    self.identity: dict[str, int | str] = {"mixture": " + ".join(parts)}
    for i, order in enumerate(self._orders):
      self.identity |= {f"{key} of part {i + 1}": value for key, value in order.identity.items()}

  def __call__(self, elements: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    periods, places = np.divmod(np.asarray(elements, np.int64), int(self._shares.sum()))
    parts, ranks = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
    for period in np.unique(periods):
      here = periods == period
      parts[here], ranks[here] = (table[places[here]] for table in _period(self._shares_key(), self._seed, int(period)))
    numbers = periods * self._shares[parts] + ranks  # of the element within its source's own stream
    records = np.empty(len(places), np.int64)
    for part in np.unique(parts):
      mine = parts == part
      records[mine] = self._starts[part] + self._orders[part](numbers[mine])
    return records

  def alternatives(self, record: int, *, far: bool = False) -> range:
    part = int(np.searchsorted(self._starts, record, side="right")) - 1
    start = int(self._starts[part])
    mine = self._orders[part].alternatives(record - start, far=far)
    return range(start + mine.start, start + mine.stop)

  def _shares_key(self) -> tuple[int, ...]:
    return tuple(self._shares.tolist())


@functools.lru_cache(maxsize=64)
def _period(
  shares: tuple[int, ...], seed: int, period: int
) -> tuple[Int[np.ndarray, " places"], Int[np.ndarray, " places"]]:
  """(whose each place of a period is, which of its places in this period that is)."""
  parts = np.repeat(np.arange(len(shares)), shares)
  parts = parts[shuffled(np.arange(len(parts)), len(parts), _seed_of(seed, _PERIOD, period, 0))]
  ranks = np.empty(len(parts), np.int64)
  for part, share in enumerate(shares):
    ranks[parts == part] = np.arange(share)
  return parts, ranks


def _seed_of(seed: int, purpose: int, first: int, second: int) -> int:
  """A seed of its own for each purpose and pair of numbers."""
  numbers = np.array([seed % (1 << 64), purpose, first, second], np.uint64)
  mixed = np.uint64(0)
  for number in numbers:
    mixed = _mix(np.array([mixed]) + number)[0]
  return int(mixed)


def shuffled(elements: Int[np.ndarray, " n"], records: int, seed: int) -> Int[np.ndarray, " n"]:
  """Which record each element of the endless stream is: element e is entry e % records of epoch e // records.

  Within an epoch every record comes exactly once.
  """
  epochs, entries = np.divmod(np.asarray(elements, np.int64), records)
  keys = _mix(_mix(np.full(len(entries), seed % (1 << 64), np.uint64)) + epochs.astype(np.uint64))  # [n]
  half = max(1, -(-(records - 1).bit_length() // 2))
  values = _feistel(entries.astype(np.uint64), keys, half)
  while (outside := values >= records).any():
    values[outside] = _feistel(values[outside], keys[outside], half)
  return values.astype(np.int64)


def _feistel(values: UInt64[np.ndarray, " n"], keys: UInt64[np.ndarray, " n"], half: int) -> UInt64[np.ndarray, " n"]:
  """A permutation of the numbers below 2^(2 half), one for each key."""
  low, shift = np.uint64((1 << half) - 1), np.uint64(half)
  left, right = values >> shift, values & low
  for round_ in range(_ROUNDS):
    left, right = right, left ^ (_mix(keys + np.uint64(round_) + (right << np.uint64(8))) & low)
  return (left << shift) | right


def _mix(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
  """Scrambles 64 bits (the finaliser of splitmix64): each bit of the result depends on every bit."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))
