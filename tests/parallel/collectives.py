"""What a compiled program sends between devices: the collectives of its HLO, and over which axes of the mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_DEFINITION = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
# The groups of devices: rows of a transposed range, or axes of a mesh of a (transposed) range, or listed.
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
  """One array that a collective makes on every device.

  Attributes:
    kind: one of `KINDS`.
    dtype: as HLO writes it: "f32", "bf16", "s32", …
    shape: of the result on one device.
    axes: mesh axes along which the devices differ that exchange data.
    name: where the operation comes from, as in "jit(step)/student/…"; "" if unknown.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  name: str

  @property
  def size(self) -> int:
    """Elements of the result."""
    return math.prod(self.shape)


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
  """The collectives of a compiled program, in the order of its text; one inside a loop counts once.

  Args:
    hlo: `compiled.as_text()`.
    mesh: on which it was compiled; its devices in the order of the program's partitions.
  """
  found = []
  for result, kind, start, rest in _DEFINITION.findall(hlo):
    arrays = [(dtype, _numbers(shape)) for dtype, shape in _ARRAY.findall(result)]
    if start and kind != "all-reduce" and len(arrays) > 1:
      arrays = arrays[len(arrays) // 2 :]  # an asynchronous result is (operands, results)
    name = _NAME.search(rest)
    axes = _axes(_groups(rest, mesh.size), mesh)
    found += [Collective(kind, dtype, shape, axes, name[1] if name else "") for dtype, shape in arrays]
  return found


def _groups(text: str, num_devices: int) -> list[tuple[int, ...]]:
  """The devices, as positions in the mesh, of every group that exchanges data."""
  if iota := _IOTA.search(text):
    order = _transposed(iota[3], iota[4])
    return [tuple(group) for group in order.reshape(int(iota[1]), int(iota[2])).tolist()]
  if mesh := _MESH.search(text):
    return _mesh_groups(mesh[1], _transposed(mesh[2] or str(num_devices), mesh[3]), mesh[4])
  if listed := _LISTED.search(text):
    return [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
  if "replica_groups={}" in text:
    return [tuple(range(num_devices))]
  raise ValueError(f"no groups of devices that are understood here: {text}")


def _transposed(shape: str, order: str | None) -> np.ndarray:
  devices = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return devices.transpose(_numbers(order)) if order else devices


def _mesh_groups(sizes: str, devices: np.ndarray, grouped: str) -> list[tuple[int, ...]]:
  """Groups along axes, or along parts of axes as in 'axis_1':(2)4, of which 2 lie before and the rest behind."""
  parts: dict[str, list[int]] = {name: [int(size)] for name, size, _, _ in _AXIS.findall(sizes)}
  chosen: set[tuple[str, int]] = set()
  for name, _, before, size in _AXIS.findall(grouped):
    if size:
      whole = math.prod(parts[name])
      parts[name] = [int(before), int(size), whole // int(before) // int(size)]
    chosen.add((name, 1 if size else 0))
  places = [(name, i) for name, split in parts.items() for i in range(len(split))]
  cube = devices.reshape([parts[name][i] for name, i in places])
  inside = [n for n, place in enumerate(places) if place in chosen]
  rest = [n for n in range(len(places)) if n not in inside]
  size = math.prod(cube.shape[n] for n in inside)
  return [tuple(group) for group in cube.transpose(*rest, *inside).reshape(-1, size).tolist()]


def _axes(groups: list[tuple[int, ...]], mesh: Mesh) -> tuple[str, ...]:
  places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)  # [devices, axes]
  differ = np.zeros(len(mesh.axis_names), bool)
  for group in groups:
    differ |= np.any(places[list(group)] != places[group[0]], axis=0)
  return tuple(axis for axis, moved in zip(mesh.axis_names, differ, strict=True) if moved)


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(",") if number.strip())


def moved_activations(
  found: Iterable[Collective],
  mesh: Mesh,
  parameters: Iterable[tuple[int, ...]],
  *,
  batch_axes: Iterable[str],
  largest_sum: int,
  prototypes: Iterable[int] = (),
) -> list[Collective]:
  """The collectives of a training step that move activations or logits; a sound step has none.

  What may move: parameters and their gradients, whole or in parts (ZeRO, data parallelism); partial sums of
  activations along axes that do not divide the batch (tensor parallelism); sums over the images, which have no axis of
  images. Parameters are known by their number of elements, so the sizes of a program that is to be judged must not
  coincide.

  Args:
    found: see `collectives`.
    mesh: of the program.
    parameters: shapes of all of them.
    batch_axes: mesh axes over which the images are spread.
    largest_sum: elements of the largest sum over images that is no gradient, such as a covariance.
    prototypes: numbers of prototypes: where `tensor` divides them, no device should have all scores of a token.
  """
  sizes = _parts(parameters, mesh)
  batch_axes, logits = set(batch_axes), set(prototypes) if mesh.shape["tensor"] > 1 else set()

  def moves(one: Collective) -> bool:
    if one.size in sizes or not one.axes:
      return False
    if one.kind != "all-reduce":
      return True
    return one.size > largest_sum and (bool(batch_axes & set(one.axes)) or bool(logits & set(one.shape)))

  return [one for one in found if moves(one)]


def _parts(parameters: Iterable[tuple[int, ...]], mesh: Mesh) -> set[int]:
  """Elements of every parameter, of a layer's share of it, and of what a part of the mesh's axes makes of these."""
  shares = {math.prod(some) for n in range(len(mesh.shape) + 1) for some in combinations(mesh.shape.values(), n)}
  sizes = set()
  for shape in parameters:
    for whole in {math.prod(shape), math.prod(shape[1:])}:
      sizes |= {whole // share for share in shares if whole % share == 0}
  return sizes
