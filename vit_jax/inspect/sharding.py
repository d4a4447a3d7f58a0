"""How a training state lies on a mesh: where every parameter is divided, and what each device holds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from vit_jax import parallel
from vit_jax.inspect.columns import align

NAMES = {  # of the parts that every state may have, in the order of the table
  "student": "student",
  "teacher": "teacher",
  "frozen": "frozen teacher",
  "opt_state": "optimizer",
}


class Leaf(NamedTuple):
  """An array of a state on a mesh.

  Attributes:
    path: "student/backbone/blocks/attn/qkv/kernel".
    shape: of the whole array.
    spec: mesh axes of each dimension.
    size: elements.
    bytes: of the whole array.
    held: bytes on each device.
  """

  path: str
  shape: tuple[int, ...]
  spec: PartitionSpec
  size: int
  bytes: int
  held: int

  @property
  def part(self) -> str:
    """The field of the state, or the part of what its method keeps."""
    field, own, *_ = self.path.split("/")
    return own if field == "own" else field

  @property
  def whole(self) -> bool:
    """Whether every device holds all of it."""
    return self.held == self.bytes


def leaves(state: Any, mesh: Mesh | AbstractMesh, *, zero: int = 3) -> list[Leaf]:
  """Every parameter, average and moment of a state (arrays or shapes), in its order."""
  found = []
  shardings = jax.tree.leaves(parallel.state_shardings(state, mesh, zero=zero))
  for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(state), shardings, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if leaf.ndim:
      held = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
      total = leaf.size * leaf.dtype.itemsize
      found.append(Leaf(name, leaf.shape, sharding.spec, leaf.size, total, held))
  return found


def sharding_table(state: Any, mesh: Mesh | AbstractMesh, *, zero: int = 3, width: int | None = None) -> str:
  """Every parameter with its shape, mesh axes and bytes per device, then the sums of the parts of the state.

  Args:
    state: a training state, of arrays or of shapes.
    mesh: with the axes of `parallel.make_mesh`; its devices need not exist.
    zero: as in `mesh.zero`.
    width: as in `columns.align`.
  """
  found = leaves(state, mesh, zero=zero)
  devices = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1"
  lines = [f"{mesh.size} devices: {devices}; zero {zero}", ""]
  rows = [("parameter", "shape", "mesh axes", "per device")]
  shown = [leaf for leaf in found if leaf.part in ("student", "frozen")]
  rows += [(leaf.path, " x ".join(map(str, leaf.shape)), axes(leaf), size(leaf.held)) for leaf in shown]
  lines += [align(rows, right=(3,), width=width), ""]
  totals = [("part", "numbers", "in all", "per device", "whole on every device")]
  for part in dict.fromkeys([*NAMES, *(leaf.part for leaf in found)]):
    if own := [leaf for leaf in found if leaf.part == part]:
      totals.append(_total(NAMES.get(part, part.replace("_", " ")), own))
  totals.append(_total("all", found))
  lines.append(align(totals, right=(1, 2, 3, 4), width=width))
  if zero == 1:
    note = "With mesh.zero=1 fsdp spreads the teachers and the optimizer; the student is divided by tensor only."
    lines.append(align([(note,)], width=width))
  return "\n".join(lines)


def axes(leaf: Leaf) -> str:
  """The mesh axes of each dimension: "(-, fsdp, -, tensor)"."""
  if leaf.whole:
    return "-"
  names = [".".join(entry) if isinstance(entry, tuple) else entry or "-" for entry in leaf.spec]
  return f"({', '.join(names)})"


def size(num: float) -> str:
  """Bytes for people: 1.5 GiB."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if num < 1024:
      return f"{num:.0f} B" if unit == "B" else f"{num:.1f} {unit}"
    num /= 1024
  return f"{num:.1f} TiB"


def _total(name: str, found: list[Leaf]) -> tuple[str, ...]:
  total = sum(leaf.bytes for leaf in found)
  whole = sum(leaf.bytes for leaf in found if leaf.whole)
  held = sum(leaf.held for leaf in found)
  return name, f"{sum(leaf.size for leaf in found):,}", size(total), size(held), f"{whole / total:.2%}"
