"""What a compiled program sends between devices: the collectives of its HLO, and over which axes of the mesh."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_DEFINITION = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
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
    num, size = int(iota[1]), int(iota[2])
    shape = _numbers(iota[3])
    order = np.arange(math.prod(shape)).reshape(shape)
    if iota[4]:
      order = order.transpose(_numbers(iota[4]))
    return [tuple(group) for group in order.reshape(num, size).tolist()]
  if listed := _LISTED.search(text):
    return [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
  return [tuple(range(num_devices))]


def _axes(groups: list[tuple[int, ...]], mesh: Mesh) -> tuple[str, ...]:
  places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)  # [devices, axes]
  differ = np.zeros(len(mesh.axis_names), bool)
  for group in groups:
    differ |= np.any(places[list(group)] != places[group[0]], axis=0)
  return tuple(axis for axis, moved in zip(mesh.axis_names, differ, strict=True) if moved)


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(",") if number.strip())
