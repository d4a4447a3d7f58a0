"""The one table of sharding: parameter path -> logical axes -> mesh axes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from vit_jax.parallel.mesh import MeshError

MAX_UNSPREAD = 0.02  # share of the parameters that a mesh axis may leave whole for want of a divisible dimension
_NAMED = 8  # of them are listed

# Logical axes of every parameter, by the end of its path; exactly one row fits each. A leading "layers" axis is the
# stacking of the blocks (of a stage).
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"blocks/attn/qkv/kernel", ("layers", "width", None, "heads", None)),
  (r"blocks/attn/qkv/bias", ("layers", None, "heads", None)),
  (r"blocks/attn/proj/kernel", ("layers", "heads", None, "width")),
  (r"blocks/mlp/(fc1|gate|up)/kernel", ("layers", "width", "mlp")),
  (r"blocks/mlp/(fc1|gate|up)/bias", ("layers", "mlp")),
  (r"blocks/mlp/(fc2|down)/kernel", ("layers", "mlp", "width")),
  (r"blocks/(attn/proj|mlp/(fc2|down))/bias", ("layers", None)),
  (r"blocks/(norm[12]/(scale|bias)|ls[12]/gamma|attn/[qk]_norm/(scale|bias))", ("layers", None)),
  (r"patch_embed/kernel", (None, None, None, "width")),
  (r"patch_embed/bias|cls_token|mask_token", (None,)),
  (r"registers|positions", (None, None)),
  (r"layers/dwconv/kernel", ("layers", None, None, None, "width")),
  (r"layers/mlp/fc1/kernel", ("layers", "width", "mlp")),
  (r"layers/mlp/fc1/bias", ("layers", "mlp")),
  (r"layers/mlp/fc2/kernel", ("layers", "mlp", "width")),
  (r"layers/(dwconv/bias|norm/(scale|bias)|ls/gamma|mlp/fc2/bias)", ("layers", None)),
  (r"downsample\d/conv/kernel", (None, None, None, "width")),
  (r"downsample\d/(conv/bias|norm/(scale|bias))", (None,)),
  (r"(final_norm|cls_norm|local_cls_norm|norm_pre)/(scale|bias)", (None,)),
  (r"attn_pool/q/kernel", ("width", "heads", None)),
  (r"attn_pool/q/bias", ("heads", None)),
  (r"attn_pool/kv/kernel", ("width", None, "heads", None)),
  (r"attn_pool/kv/bias", (None, "heads", None)),
  (r"attn_pool/proj/kernel", ("heads", None, "width")),
  (r"attn_pool/mlp/(fc1|gate|up)/kernel", ("width", "mlp")),
  (r"attn_pool/mlp/(fc1|gate|up)/bias", ("mlp",)),
  (r"attn_pool/mlp/(fc2|down)/kernel", ("mlp", "width")),
  (r"attn_pool/(probe|norm/(scale|bias)|proj/bias|mlp/(fc2|down)/bias)", (None,)),
  (r"head/fc1/kernel", ("width", "mlp")),
  (r"head/fc2/kernel", ("mlp", "width")),
  (r"head/fc([3-9]|\d\d+)/kernel", ("width", None)),
  (r"head/fc1/bias", ("mlp",)),
  (r"head/fc([2-9]|\d\d+)/bias", (None,)),
  (r"head/last_layer/kernel", (None, "prototypes")),
  (r"centers/(dino|ibot)", ("prototypes",)),
)

# The mesh axes that a logical axis of a parameter is spread over: one after the other, each if it divides what is left.
PARAMETER_AXES: dict[str | None, tuple[str, ...]] = {
  None: (),
  "layers": (),
  "width": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "prototypes": ("tensor", "fsdp"),
}

# Where a logical axis of an activation goes (flax.linen.logical_axis_rules).
ACTIVATION_AXES: tuple[tuple[str, Any], ...] = (
  ("batch", ("replica", "data", "fsdp")),
  ("width", None),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("prototypes", "tensor"),
)


class RuleError(ValueError):
  """A parameter fits no rule, or several, or one of another rank."""


def logical_axes(path: str, rank: int) -> tuple[str | None, ...]:
  """The logical axes of the parameter at `path`.

  Raises:
    RuleError: unless exactly one rule fits.
  """
  found = [axes for pattern, axes in PARAMETERS if re.search(rf"(^|/|_)({pattern})$", path)]
  if len(found) != 1 or len(found[0]) != rank:
    raise RuleError(
      f"parameter {path!r} of rank {rank} fits {len(found)} rules {found}: give it exactly one in parallel/rules.py."
    )
  return found[0]


class Unspread(NamedTuple):
  """A parameter that its rule asks to spread over a mesh axis, which does not divide it.

  Attributes:
    path, shape: of the parameter.
    axis: of the mesh.
    size: the number of rows that the axis does not divide.
  """

  path: str
  shape: tuple[int, ...]
  axis: str
  size: int


def placed(
  path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, *, without: tuple[str, ...] = ()
) -> tuple[PartitionSpec, list[Unspread]]:
  """The mesh axes of one parameter, and those that do not divide it, over which it stays whole.

  Args:
    without: mesh axes over which it is to stay whole.
  """
  spec, whole = [], []
  for logical, size in zip(logical_axes(path, len(shape)), shape, strict=True):
    axes, left = [], size
    for axis in PARAMETER_AXES[logical]:
      if mesh.shape[axis] == 1 or axis in without:
        continue
      if left % mesh.shape[axis]:
        whole.append(Unspread(path, shape, axis, left))
        continue
      axes.append(axis)
      left //= mesh.shape[axis]
    spec.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
  return PartitionSpec(*spec), whole


def parameter_sharding(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
  """A function that says how the parameter at a path, of a shape, is spread over the mesh."""
  return lambda path, shape: NamedSharding(mesh, placed(path, shape, mesh)[0])


_STUDENT = re.compile(r"^student/")


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, *, zero: int = 3) -> Any:
  """A sharding for every leaf of a training state (arrays or shapes): arrays by rule, scalars on every device.

  What is like parameters (averages, moments, further teachers) has their paths, and so their rules.

  Args:
    zero: what is spread over `fsdp`. 3: parameters, teachers and optimizer state; 1: all but the student's parameters
      (ZeRO stages 3 and 1, Rajbhandari et al. 2020).
  """

  def sharding(path: tuple, leaf: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not leaf.shape:
      return NamedSharding(mesh, PartitionSpec())
    without = ("fsdp",) if zero == 1 and _STUDENT.match(name) else ()
    return NamedSharding(mesh, placed(name, leaf.shape, mesh, without=without)[0])

  return jax.tree_util.tree_map_with_path(sharding, state)


def check_spread(state: Any, mesh: Mesh | AbstractMesh) -> None:
  """No mesh axis may leave more than `MAX_UNSPREAD` of the parameters whole that the rules spread over it.

  Every device would then hold, and compute, what was to be divided among them.

  Raises:
    MeshError: naming the parameters, and the size of the axis that would divide them.
  """
  sizes: dict[str, int] = {}
  unspread: dict[str, list[Unspread]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.startswith(("student/", "frozen/")):  # the others are copies, or as large
      sizes[name] = leaf.size
      for found in placed(name, leaf.shape, mesh)[1]:
        unspread.setdefault(found.axis, []).append(found)
  for axis, found in unspread.items():
    share = sum(sizes[path] for path in {one.path for one in found}) / sum(sizes.values())
    if share > MAX_UNSPREAD:
      found.sort(key=lambda one: -sizes[one.path])
      listed = "\n".join(f"  {one.path} {one.shape}: {one.size} is no multiple of it" for one in found[:_NAMED])
      more = f"\n  and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
      right = math.gcd(mesh.shape[axis], *(one.size for one in found))
      others = mesh.shape[axis] // right
      raise MeshError(
        f"mesh.{axis}={mesh.shape[axis]}: does not divide {share:.0%} of the parameters, which every device along it "
        f"would hold whole:\n{listed}{more}\nset mesh.{axis}={right} and leave the factor of {others} to mesh.data or "
        "mesh.replica, or change the sizes of the model"
      )
