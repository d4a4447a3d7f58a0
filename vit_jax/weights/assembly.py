"""Parameters out of tensors and tensors out of parameters, piece by piece: never more than one of them in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from vit_jax.weights.finite import is_finite
from vit_jax.weights.layout import Row, Shape

Index = tuple[slice, ...]


class Slot(NamedTuple):
  """Where one tensor of the file, or one chunk of it, belongs."""

  row: Row
  layer: int | None
  shape: Shape  # of the parameter's slice that the tensor holds

  @property
  def name(self) -> str:
    """The tensor's name."""
    return self.row.name.format(i=self.layer)

  @property
  def file_shape(self) -> Shape:
    """The shape of the whole tensor."""
    first, *rest = self.row.form.file_shape(self.shape)
    return (first * (self.row.chunk[1] if self.row.chunk else 1), *rest)

  @property
  def place(self) -> dict[int, int]:
    """The slice of the parameter: axis → index; along the other axes it is whole."""
    place = {} if self.layer is None else {0: self.layer}
    if self.row.part is not None:
      place[self.row.part[0] + len(place)] = self.row.part[1]
    return place

  def from_file(self, tensor: Any, index: Index) -> np.ndarray:
    """A part of the parameter's slice; of a tensor that is a view of a file, no more than that is read."""
    tensor = np.asarray(tensor)
    if self.row.chunk is not None:
      tensor = np.split(tensor, self.row.chunk[1])[self.row.chunk[0]]
    return self.row.form.from_file(tensor, self.shape)[index]

  def to_file(self, parameter: Any) -> np.ndarray:
    """The tensor, or the chunk of it, that a parameter makes."""
    place = self.place
    index = tuple(place.get(axis, slice(None)) for axis in range(parameter.ndim))
    return self.row.form.to_file(_fetched(parameter, index))


class Parameter(NamedTuple):
  """A parameter of a model, and the tensors of a file of which it is made."""

  shape: Shape
  dtype: np.dtype
  sources: list[tuple[Any, Slot]]

  def read(self, index: Index | None = None, nonfinite: set[str] | None = None) -> np.ndarray:
    """The values of a part of it (None: of all); besides them, one tensor is in memory at a time.

    Args:
      index: the part.
      nonfinite: gets the names of the tensors that hold NaN or infinity there.
    """
    index = (slice(None),) * len(self.shape) if index is None else index
    ranges = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
    out = np.zeros([len(r) for r in ranges], self.dtype)  # what no tensor holds is zero
    for tensor, slot in self.sources:
      place = slot.place
      if all(number in ranges[axis] for axis, number in place.items()):
        inside = tuple(place[axis] - r.start if axis in place else slice(None) for axis, r in enumerate(ranges))
        out[inside] = slot.from_file(tensor, tuple(part for axis, part in enumerate(index) if axis not in place))
        if nonfinite is not None and not is_finite(out[inside]):
          nonfinite.add(slot.name)
    return out

  def put(self, sharding: jax.sharding.Sharding, nonfinite: set[str] | None = None) -> jax.Array:
    """It on devices, one shard after the other: the host has one in memory, and what JAX has not let go of yet."""
    placed = [(str(index), index, d) for d, index in sharding.addressable_devices_indices_map(self.shape).items()]
    placed.sort(key=lambda entry: entry[0])
    shards = []
    for _, same in itertools.groupby(placed, key=lambda entry: entry[0]):  # the devices that hold one shard
      _, indices, devices = zip(*same, strict=True)
      values = self.read(indices[0], nonfinite)
      shards += [jax.device_put(values, device).block_until_ready() for device in devices]
      del values  # before the next is read
    return jax.make_array_from_single_device_arrays(self.shape, sharding, shards)


def maker(parts: list[tuple[Any, Slot]]) -> Callable[[], np.ndarray]:
  """A function that makes a tensor of a file from the parameters that it holds."""
  ordered = sorted(parts, key=lambda part: part[1].row.chunk or (0, 1))

  def make() -> np.ndarray:
    made = [slot.to_file(parameter) for parameter, slot in ordered]
    return np.ascontiguousarray(np.concatenate(made) if len(made) > 1 else made[0])

  return make


def _fetched(value: Any, index: tuple[Any, ...]) -> np.ndarray:
  """A slice of an array, brought from the devices by itself if it is not in the memory of the host already."""
  if isinstance(value, jax.Array) and (len(value.devices()) > 1 or next(iter(value.devices())).platform != "cpu"):
    return np.asarray(value[index])
  return np.asarray(value)[index]
