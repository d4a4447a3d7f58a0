"""What the devices of a compiled program send each other, from its HLO: how much, how often, along which mesh axes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from vit_jax.inspect.hlo import COLLECTIVES, Instruction, Program, arrays_of, bytes_of

# The groups of devices: rows of a transposed range, or axes of a mesh of a (transposed) range, or listed.
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\((\d+)\)(\d+))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Collective:
  """All collectives of one kind over groups of one make-up, in one step on one device.

  Attributes:
    kind: "all-gather", …
    group: devices that take part together.
    per_host: how many of them are on one host of `host` devices, see `collectives`.
    count: executions.
    payload: bytes, all executions together: of the gathered result, of the input of a reduction.
    wire: bytes that this device sends in a ring over the group.
  """

  kind: str
  group: int
  per_host: int
  count: int
  payload: float
  wire: float


class Moved(NamedTuple):
  """One array that a collective makes on every device.

  Attributes:
    kind: of `COLLECTIVES`.
    dtype: as HLO writes it: "f32", "bf16", "s32", …
    shape: of the result on one device.
    axes: mesh axes along which the devices differ that exchange data.
    name: where the operation comes from, as in "jit(step)/student/…"; "" if unknown.
    times: executions in one step.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  name: str
  times: int = 1

  @property
  def size(self) -> int:
    """Elements of the result."""
    return math.prod(self.shape)


def collectives(program: Program, *, devices: int, host: int) -> list[Collective]:
  """The collectives of one step on one device, in sums, largest first.

  Args:
    devices: of the program.
    host: devices of a host; its numbers are consecutive.
  """
  total: dict[tuple[str, int, int], Collective] = {}
  for kind, instruction, shapes, runs in _each(program):
    group = _groups(instruction.rest, devices)[0]
    if len(group) == 1:
      continue
    into = sum(bytes_of(shapes.get(name, "")) for name in instruction.operands)
    # The result of a -start holds its operands, too; what is gathered is the operands of the whole group.
    payload = float(into * len(group) if kind == "all-gather" else into)
    share = (len(group) - 1) / len(group)
    wire = {"all-reduce": 2 * payload * share, "collective-permute": payload}.get(kind, payload * share)
    hosts = [member // host for member in group]
    key = kind, len(group), max(hosts.count(number) for number in set(hosts))
    before = total.get(key, Collective(*key, 0, 0.0, 0.0))
    total[key] = dataclasses.replace(
      before,
      count=before.count + int(runs),
      payload=before.payload + payload * runs,
      wire=before.wire + wire * runs,
    )
  return sorted(total.values(), key=lambda c: -c.wire)


def moved(program: Program, mesh: Mesh) -> list[Moved]:
  """Every array that a collective makes, in the order of the program's text.

  Args:
    mesh: on which it was compiled; its devices in the order of the program's partitions.
  """
  found = []
  for kind, instruction, _, runs in _each(program):
    arrays = arrays_of(instruction.shape)
    if instruction.opcode.endswith("-start") and kind != "all-reduce" and len(arrays) > 1:
      arrays = arrays[len(arrays) // 2 :]  # an asynchronous result is (operands, results)
    name = _NAME.search(instruction.rest)
    axes = _axes(_groups(instruction.rest, mesh.size), mesh)
    found += [Moved(kind, dtype, shape, axes, name[1] if name else "", int(runs)) for dtype, shape in arrays]
  return found


def _each(program: Program) -> Iterator[tuple[str, Instruction, dict[str, str], float]]:
  """(kind, instruction, result types around it, runs) of every collective."""
  for name, runs in program.times().items():
    shapes = program.shapes(name)
    for instruction in program.computations[name]:
      if instruction.opcode == "fusion":  # a TPU compiler hides collectives, an all-reduce with a slice among them
        inner = program.fused(instruction)
        scatters = "all-reduce-scatter" in instruction.name + instruction.rest
        types = {i.name: i.shape for i in inner}
        for hidden in inner:
          if hidden.opcode in COLLECTIVES:
            scattered = scatters and hidden.opcode == "all-reduce"
            yield "reduce-scatter" if scattered else hidden.opcode, hidden, types, runs
      elif (kind := instruction.opcode.removesuffix("-start")) in COLLECTIVES:
        yield kind, instruction, shapes, runs


def _groups(text: str, devices: int) -> list[tuple[int, ...]]:
  """The devices, as positions in the mesh, of every group that exchanges data."""
  if iota := _IOTA.search(text):
    order = _transposed(iota[3], iota[4])
    return [tuple(group) for group in order.reshape(int(iota[1]), int(iota[2])).tolist()]
  if mesh := _MESH.search(text):
    return _mesh_groups(mesh[1], _transposed(mesh[2] or str(devices), mesh[3]), mesh[4])
  if listed := _LISTED.search(text):
    return [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", listed[1])]
  if "replica_groups={}" in text:
    return [tuple(range(devices))]
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
  return tuple(axis for axis, moves in zip(mesh.axis_names, differ, strict=True) if moves)


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(",") if number.strip())
