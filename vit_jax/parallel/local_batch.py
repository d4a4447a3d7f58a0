"""The part of a batch that a process reads, and global arrays made of such parts."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import NamedSharding


class LocalBatch:
  """Which rows of a batch the devices of this process hold.

  Not always the rows i b/n … of process i: a mesh may place neighbouring rows on the devices of different machines, and
  processes that share the tensor axis hold the same rows.

  Args:
    sharding: of the leading axis of every array of a batch.
  """

  def __init__(self, sharding: NamedSharding):
    self._sharding = sharding
    every = sharding.devices_indices_map((sharding.num_devices,))
    starts = sorted({_start(index) for index in every.values()})
    self.num_shards = len(starts)
    width = sharding.num_devices // self.num_shards
    mine = sharding.addressable_devices_indices_map((sharding.num_devices,))
    self.shards = tuple(sorted({_start(index) // width for index in mine.values()}))  # of num_shards equal parts

  def parts(self, number: int) -> list[int]:
    """Of so many equal parts of the batch (rows, or loss groups) those that this process reads, in order."""
    share = number // self.num_shards
    return [part for shard in self.shards for part in range(shard * share, (shard + 1) * share)]

  def whole(self, rows: np.ndarray) -> jax.Array:
    """The global array of which this process has read `rows`, in the order of `parts`."""
    share = len(rows) // len(self.shards)
    place = {shard * share: i * share for i, shard in enumerate(self.shards)}
    shape = (share * self.num_shards, *rows.shape[1:])

    def read(index: tuple[slice, ...]) -> np.ndarray:
      first = place[_start(index)]
      return rows[first : first + share]

    return jax.make_array_from_callback(shape, self._sharding, read)


def _start(index: tuple[slice, ...]) -> int:
  return index[0].start or 0
