"""The device mesh: a product of named axes, one of which may take what is left."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

log = logging.getLogger(__name__)

AXES = ("replica", "data", "fsdp", "tensor")
BATCH_AXES = ("replica", "data", "fsdp")


class MeshError(ValueError):
  """The mesh does not fit the devices, or the batch does not fit the mesh."""


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> tuple[int, ...]:
  """The size of every axis, with a single -1 taking the devices that are left.

  Args:
    sizes: by axis; other keys do not matter.

  Raises:
    MeshError: if the sizes do not multiply to the number of devices.
  """
  known = math.prod(sizes[axis] for axis in AXES if sizes[axis] > 0)
  free = [axis for axis in AXES if sizes[axis] == -1]
  fits = num_devices % known == 0 if free else num_devices == known
  if len(free) > 1 or not fits:
    given = ", ".join(f"mesh.{axis}={sizes[axis]}" for axis in AXES)
    raise MeshError(f"{given}: must multiply to the {num_devices} devices; one axis may be -1.")
  return tuple(num_devices // known if axis in free else sizes[axis] for axis in AXES)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over `devices` (all by default) with the axes replica, data, fsdp and tensor.

  Raises:
    MeshError: if the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = mesh_shape(sizes, len(devices))
  return Mesh(placed(shape, devices, slice_index), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_index(device: Any) -> int:
  """Which of the groups that have a fast network of their own a device is in: a slice of TPUs, a host's GPUs."""
  return getattr(device, "slice_index", None) or 0


def placed(shape: tuple[int, ...], devices: Sequence[Any], slice_of: Callable[[Any], int]) -> np.ndarray:
  """The devices in the shape of a mesh: its last axes within the slices, and as their networks connect them.

  `jax.make_mesh` refuses devices of several slices, which is what JAX calls several hosts with GPUs.
  """
  slices: dict[int, list[Any]] = {}
  for device in devices:
    slices.setdefault(slice_of(device), []).append(device)
  if len({len(members) for members in slices.values()}) > 1:  # nothing to gain then
    return np.array(sorted(devices, key=lambda device: (slice_of(device), device.id))).reshape(shape)
  outer, left = [], len(slices)
  for size in shape:
    outer.append(math.gcd(size, left))
    left //= outer[-1]
  if outer[-1] > 1:
    log.warning("mesh.tensor=%d: reaches over hosts, or slices, whose connection is slow.", shape[-1])
  inner = tuple(size // part for size, part in zip(shape, outer, strict=True))
  # Splitting one dimension of a TPU's torus over two axes is better than an error, and is done only where it must be.
  parts = [create_device_mesh(inner, slices[index], allow_split_physical_axes=True) for index in sorted(slices)]
  whole = np.stack(parts).reshape(*outer, *inner)
  order = [axis for pair in zip(range(len(shape)), range(len(shape), 2 * len(shape)), strict=True) for axis in pair]
  return whole.transpose(order).reshape(shape)


def abstract_mesh(sizes: Mapping[str, int], num_devices: int) -> AbstractMesh:
  """The mesh that `make_mesh` would make of so many devices, which need not be there."""
  return AbstractMesh(mesh_shape(sizes, num_devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
  """Over how many parts the images of a batch are spread."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis over all data axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(mesh: Mesh, *, batch_size: int, loss_group_size: int, micro_batches: int = 1) -> None:
  """Loss groups must not straddle devices: their gathers would cross them; nor may micro-batches be uneven on them.

  Raises:
    MeshError: naming the sizes that would be right.
  """
  shards = batch_shards(mesh)
  if batch_size % shards:
    near = max(round(batch_size / shards), 1) * shards
    raise MeshError(f"batch_size={batch_size}: must be a multiple of the {shards} devices it is spread over: {near}.")
  if (batch_size // shards) % loss_group_size:
    right = math.gcd(batch_size // shards, loss_group_size)
    raise MeshError(
      f"loss_group_size={loss_group_size}: must divide the {batch_size // shards} images of one device "
      f"(batch_size={batch_size} over {shards}); for example {right}, or batch_size={shards * loss_group_size}."
    )
  groups = batch_size // shards // loss_group_size
  if groups % micro_batches:
    share = batch_size // shards
    right = math.gcd(share // micro_batches, loss_group_size) if share % micro_batches == 0 else None
    choose = f"loss_group_size={right}" if right else f"micro_batches={math.gcd(groups, micro_batches)}"
    raise MeshError(
      f"micro_batches={micro_batches}: must divide the {groups} loss groups of one device (batch_size={batch_size} "
      f"over {shards} devices in groups of loss_group_size={loss_group_size}); for example {choose}."
    )
