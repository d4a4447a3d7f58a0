"""Between state dicts (names → arrays of a published layout) and parameter trees; every mismatch is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.models import ProjectionHead
from vit_jax.weights.dinov3 import DINOV3
from vit_jax.weights.errors import WeightMismatch, WeightsError
from vit_jax.weights.hf import HF_DINOV3
from vit_jax.weights.layout import STACKED, Buffer, Layout, Row, Shape

LAYOUTS: dict[str, Layout] = {"dinov3": DINOV3, "hf_dinov3": HF_DINOV3}


class _Slot(NamedTuple):
  """Where one tensor of the file belongs."""

  row: Row
  layer: int | None
  shape: Shape  # of the parameter's slice that the tensor holds

  @property
  def file_shape(self) -> Shape:
    return self.row.form.file_shape(self.shape)

  @property
  def index(self) -> tuple[Any, ...]:
    """The tensor's place in the parameter."""
    index: list[Any] = [] if self.layer is None else [self.layer]
    if self.row.part is not None:
      axis, number = self.row.part
      index += [slice(None)] * axis + [number]
    return tuple(index)


def from_state_dict(state_dict: Mapping[str, Any], model: nn.Module, layout: str = "dinov3") -> dict[str, Any]:
  """Parameters of a model from a state dict.

  Buffers that follow from the model's attributes (rotary periods, bias masks) are checked where the state dict has
  them. Narrow types are widened to the model's `param_dtype`; float64 stays float64 where jax's x64 mode is on.

  Args:
    state_dict: tensor names → arrays. Take a part of a larger one with `select` first.
    model: a `VisionTransformer` or `ProjectionHead` of the same architecture.
    layout: the naming scheme, a key of `LAYOUTS`.

  Returns:
    The tree to pass as `model.apply({"params": …})`.

  Raises:
    WeightMismatch: if a tensor is missing, extra, misshapen, or a buffer contradicts the model; lists all of them.
  """
  table = _layout(layout)
  shapes = _parameter_shapes(model, _input_width(state_dict, table, model))
  slots = _slots(table, layout, model, shapes)
  buffers = {buffer.name: buffer for buffer in table.buffers(model)}
  problems = _compare(state_dict, {name: slot.file_shape for name, slot in slots.items()}, buffers)
  if problems:
    hint = _prefix_hint(state_dict, slots)
    raise WeightMismatch(
      f"{len(problems)} tensors of the state dict do not fit the {type(model).__name__} (layout {layout!r}); check the "
      "model's attributes:\n" + "\n".join(problems) + hint
    )
  least = jnp.dtype(model.param_dtype)
  params: dict[str, np.ndarray] = {}
  for name, slot in slots.items():
    tensor = np.asarray(state_dict[name])
    if slot.row.path not in params:
      params[slot.row.path] = np.zeros(shapes[slot.row.path], jnp.promote_types(tensor.dtype, least))
    params[slot.row.path][slot.index] = slot.row.form.from_file(tensor, slot.shape)
  return unflatten_dict({path: jnp.asarray(value) for path, value in params.items()}, sep="/")


def to_state_dict(params: Mapping[str, Any], model: nn.Module, layout: str = "dinov3") -> dict[str, np.ndarray]:
  """The state dict of a model's parameters (or of anything of their structure, such as gradients), buffers included.

  Args:
    params: the model's parameter tree.
    model: the model.
    layout: the naming scheme, a key of `LAYOUTS`.

  Raises:
    WeightMismatch: if the parameters are not those of the model, or the layout cannot hold them; lists all of them.
  """
  table = _layout(layout)
  given = flatten_dict(dict(params), sep="/")
  width = np.shape(given["fc1/kernel"])[0] if "fc1/kernel" in given else 1
  shapes = _parameter_shapes(model, width)
  problems = _compare(given, shapes, {})
  if problems:
    raise WeightMismatch(
      f"{len(problems)} parameters are not those of the {type(model).__name__}:\n" + "\n".join(problems)
    )
  arrays = {path: np.asarray(value) for path, value in given.items()}
  state_dict = {
    name: np.ascontiguousarray(slot.row.form.to_file(arrays[slot.row.path][slot.index]))
    for name, slot in _slots(table, layout, model, shapes).items()
  }
  return state_dict | {buffer.name: buffer.value for buffer in table.buffers(model)}


def select(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """The part of a state dict under a prefix, without it: a nested dict ("teacher") or names that begin so
  ("backbone.").

  Raises:
    WeightsError: if there is no such part; says what there is.
  """
  inner = state_dict.get(prefix)
  if isinstance(inner, Mapping):
    return dict(inner)
  found = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
  if not found:
    there = sorted({name.split(".")[0] for name in state_dict})
    raise WeightsError(f"the state dict has nothing under {prefix!r}; its names begin with {', '.join(there)}.")
  return found


def _layout(name: str) -> Layout:
  if name not in LAYOUTS:
    raise WeightsError(f"there is no layout {name!r}; there are {', '.join(LAYOUTS)}.")
  return LAYOUTS[name]


def _parameter_shapes(model: nn.Module, width: int) -> dict[str, Shape]:
  """Shapes of all parameters by path; `width` is the input of a head."""
  if isinstance(model, ProjectionHead):
    example = jax.ShapeDtypeStruct((1, width), jnp.float32)
  else:
    example = jax.ShapeDtypeStruct((1, model.patch_size, model.patch_size, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), example)
  return {path: leaf.shape for path, leaf in flatten_dict(variables["params"], sep="/").items()}


def _input_width(state_dict: Mapping[str, Any], table: Layout, model: nn.Module) -> int:
  """The input width of a head, which its attributes do not say."""
  name = next((row.name for row in table.rows(model) if row.path == "fc1/kernel"), None)
  return np.shape(state_dict[name])[-1] if name in state_dict and np.ndim(state_dict[name]) == 2 else 1


def _slots(table: Layout, layout: str, model: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, _Slot]:
  slots, covered = {}, set()
  for row in table.rows(model):
    if row.path not in shapes:
      continue
    covered.add(row.path)
    stacked = row.path.startswith(STACKED)
    shape = shapes[row.path][1:] if stacked else shapes[row.path]
    if row.part is not None:
      shape = shape[: row.part[0]] + shape[row.part[0] + 1 :]
    for layer in range(shapes[row.path][0]) if stacked else (None,):
      slots[row.name.format(i=layer)] = _Slot(row, layer, shape)
  uncovered = sorted(set(shapes) - covered)
  if uncovered:
    raise WeightMismatch(f"layout {layout!r} has no place for {', '.join(uncovered)}: {table.hint}.")
  return slots


def _compare(found: Mapping[str, Any], expected: Mapping[str, Shape], buffers: Mapping[str, Buffer]) -> list[str]:
  problems = [f"  missing: {name} {shape}" for name, shape in expected.items() if name not in found]
  for name, value in found.items():
    shape = "(a dict)" if isinstance(value, Mapping) else tuple(np.shape(value))
    wanted = buffers[name].value.shape if name in buffers else expected.get(name)
    if wanted is None:
      problems.append(f"  extra: {name} {shape}")
    elif shape != wanted:
      problems.append(f"  shape: {name} is {shape}, expected {wanted}")
    elif name in buffers:
      problems += _contradiction(buffers[name], np.asarray(value, np.float64))
  return problems


def _contradiction(buffer: Buffer, value: np.ndarray) -> list[str]:
  if np.allclose(value, buffer.value, rtol=buffer.rtol, atol=0.0):
    return []
  worst = int(np.nanargmax(np.where(np.isnan(value), math.inf, abs(value - buffer.value))))
  return [
    f"  value: {buffer.name}[{worst}] is {value[worst]:.6g}, expected {buffer.value[worst]:.6g} ({buffer.meaning})"
  ]


def _prefix_hint(state_dict: Mapping[str, Any], slots: Mapping[str, _Slot]) -> str:
  for name, value in state_dict.items():
    if isinstance(value, Mapping):
      return f"\nThe weights may be inside: pass weights.select(state_dict, {name!r})."
    for wanted in ("cls_token", "embeddings.cls_token", "last_layer.weight"):
      if wanted in slots and name != wanted and name.endswith("." + wanted):
        return f"\nThe names have a prefix: pass weights.select(state_dict, {name[: -len(wanted)]!r})."
  return ""
