"""The one table of sharding: parameter path -> logical axes -> mesh axes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
  (r"head/fc\d+/kernel", ("width", None)),
  (r"head/fc\d+/bias", (None,)),
  (r"head/last_layer/kernel", (None, "prototypes")),
  (r"centers/(dino|ibot)", ("prototypes",)),
)

# Where a logical axis of a parameter goes; the first mesh axis whose size divides it is taken.
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


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """Mesh axes of one parameter; a dimension that its mesh axis does not divide stays whole."""
  taken: set[str] = set()

  def place(logical: str | None, size: int) -> str | None:
    for axis in PARAMETER_AXES[logical]:
      if mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 and axis not in taken:
        taken.add(axis)
        return axis
    return None

  return PartitionSpec(*(place(axis, size) for axis, size in zip(logical_axes(path, len(shape)), shape, strict=True)))


def parameter_sharding(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
  """A function that says how the parameter at a path, of a shape, is spread over the mesh."""
  return lambda path, shape: NamedSharding(mesh, partition_spec(path, shape, mesh))


# Subtrees of a state that have the structure of the parameters.
_LIKE_PARAMETERS = re.compile(r"^(student|teacher|gram_teacher|frozen|centers|opt_state/([^/]+/)?(mu|nu))/")


def state_shardings(state: Any, mesh: Mesh) -> Any:
  """A sharding for every leaf of a training state (arrays or shapes): parameters by rule, all else replicated."""

  def sharding(path: tuple, leaf: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if _LIKE_PARAMETERS.match(name):
      return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(sharding, state)
