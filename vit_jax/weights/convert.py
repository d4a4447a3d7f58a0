"""Between state dicts (names → arrays of a published layout) and parameter trees; every mismatch is named."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.models import ProjectionHead
from vit_jax.weights import bounds
from vit_jax.weights.assembly import Parameter, Slot, maker
from vit_jax.weights.dinov2 import DINOV2
from vit_jax.weights.dinov3 import DINOV3
from vit_jax.weights.errors import WeightMismatch, WeightsError
from vit_jax.weights.finite import named
from vit_jax.weights.hf import HF_DINOV3
from vit_jax.weights.hf_convnext import HF_DINOV3_CONVNEXT
from vit_jax.weights.hf_dinov2 import HF_DINOV2
from vit_jax.weights.hf_vit import HF_VIT
from vit_jax.weights.layout import STACKED, Buffer, Layout, Shape
from vit_jax.weights.lazy import LazyTensor
from vit_jax.weights.timm import TIMM

LAYOUTS: dict[str, Layout] = {
  "dinov3": DINOV3,
  "dinov2": DINOV2,
  "hf_dinov3": HF_DINOV3,
  "hf_dinov3_convnext": HF_DINOV3_CONVNEXT,
  "hf_dinov2": HF_DINOV2,
  "hf_vit": HF_VIT,
  "timm": TIMM,
}

_log = logging.getLogger(__name__)


def from_state_dict(
  state_dict: Mapping[str, Any],
  model: nn.Module,
  layout: str = "dinov3",
  *,
  sharding: Callable[[str, Shape], jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
  """Parameters of a model from a state dict.

  One parameter (the stack of one kind of tensor of all blocks) is put together at a time, and given `sharding` and lazy
  tensors (`open_safetensors`, `open_pth`), one shard of it: a file may be larger than the memory of the host.

  Buffers that follow from the model's attributes (rotary periods, bias masks) are checked where the state dict has
  them. Narrow types are widened to the model's `param_dtype`; float64 stays float64 where jax's x64 mode is on. Of a
  file that holds more than a backbone by design (a classifier), the rest is left out, and the log says so; it warns of
  tensors that hold NaN or infinity.

  Args:
    state_dict: tensor names → arrays or lazy tensors. Take a part of a larger one with `select` first.
    model: a `VisionTransformer`, `ConvNeXt` or `ProjectionHead` of the same architecture.
    layout: the naming scheme, a key of `LAYOUTS`.
    sharding: how a parameter of this path ("blocks/mlp/fc1/kernel") and shape is spread over devices, see
      `parallel.parameter_sharding`; None: all of it on the default device.

  Returns:
    The tree to pass as `model.apply({"params": …})`.

  Raises:
    WeightMismatch: if a tensor is missing, extra, misshapen, or a buffer contradicts the model; lists all of them.
  """
  loaded, bad = {}, set()
  for path, parameter in _parameters(state_dict, model, layout).items():
    if sharding is None:
      loaded[path] = jnp.asarray(parameter.read(nonfinite=bad))
    else:
      loaded[path] = parameter.put(sharding(path, parameter.shape), bad)
  if bad:
    _log.warning("There is %s: what the model computes will hold it, too.", named(sorted(bad)))
  return unflatten_dict(loaded, sep="/")


def parameter_shapes(state_dict: Mapping[str, Any], model: nn.Module, layout: str = "dinov3") -> dict[str, Shape]:
  """The shapes, by path, of what `from_state_dict` would make, after all its checks; lazy tensors are not read.

  Raises:
    WeightMismatch: as `from_state_dict`.
  """
  return {path: parameter.shape for path, parameter in _parameters(state_dict, model, layout).items()}


def to_state_dict(params: Mapping[str, Any], model: nn.Module, layout: str = "dinov3") -> dict[str, np.ndarray]:
  """The state dict of a model's parameters (or of anything of their structure, such as gradients), buffers included.

  See `lazy_state_dict`, which makes one tensor at a time.
  """
  return {name: np.asarray(tensor) for name, tensor in lazy_state_dict(params, model, layout).items()}


def lazy_state_dict(params: Mapping[str, Any], model: nn.Module, layout: str = "dinov3") -> dict[str, LazyTensor]:
  """The state dict of a model's parameters, each tensor made (and brought from the devices) when it is asked for.

  Args:
    params: the model's parameter tree.
    model: the model.
    layout: the naming scheme, a key of `LAYOUTS`.

  Raises:
    WeightMismatch: if the parameters are not those of the model, or the layout cannot hold them; lists all of them.
  """
  table = _layout(layout, model)
  shapes, given = check_parameters(params, model), flatten_dict(dict(params), sep="/")
  tensors: dict[str, LazyTensor] = {}
  for name, slots in _slots(table, layout, model, shapes).items():
    parts = [(given[slot.row.path], slot) for slot in slots]
    tensors[name] = LazyTensor(slots[0].file_shape, parts[0][0].dtype, maker(parts))
  for buffer in table.buffers(model):
    tensors[buffer.name] = LazyTensor(buffer.value.shape, buffer.value.dtype, functools.partial(np.array, buffer.value))
  return tensors


def check_parameters(params: Mapping[str, Any], model: nn.Module) -> dict[str, Shape]:
  """The shapes by path of the parameters of a model, which those given are.

  Raises:
    WeightMismatch: if they are not; lists all of them.
  """
  given = flatten_dict(dict(params), sep="/")
  width = np.shape(given["fc1/kernel"])[0] if "fc1/kernel" in given else 1
  shapes = model_shapes(model, width)
  problems = _compare(given, shapes)
  if problems:
    raise WeightMismatch(
      f"{len(problems)} parameters are not those of the {type(model).__name__}:\n" + "\n".join(problems)
    )
  return shapes


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


def _parameters(state_dict: Mapping[str, Any], model: nn.Module, layout: str) -> dict[str, Parameter]:
  """The parameters of a model by path, checked, not yet read."""
  table = _layout(layout, model)
  state_dict = _backbone_only(state_dict, table)
  bounds.check_architecture(model, state_dict)
  shapes = model_shapes(model, _input_width(state_dict, table, model))
  slots = _slots(table, layout, model, shapes)
  required = {name: found[0].file_shape for name, found in slots.items() if not found[0].row.copy}
  copies = {name: found[0] for name, found in slots.items() if name not in required and name in state_dict}
  buffers = {buffer.name: buffer for buffer in table.buffers(model)}
  optional = {name: slot.file_shape for name, slot in copies.items()} | {n: b.value.shape for n, b in buffers.items()}
  problems = _compare(state_dict, required, optional) + _contradictions(state_dict, buffers)
  if problems:
    hint = _prefix_hint(state_dict, slots)
    raise WeightMismatch(
      f"{len(problems)} tensors of the state dict do not fit the {type(model).__name__} (layout {layout!r}); check the "
      "model's attributes:\n" + "\n".join(_condensed(problems)) + hint
    )
  for name, slot in copies.items():
    original = next(other for other in required if slots[other][0].row.path == slot.row.path)
    if not np.array_equal(state_dict[name], state_dict[original]):
      raise WeightMismatch(f"{name} should repeat another tensor, {original}, but differs from it.")
  least = jnp.dtype(model.param_dtype)
  sources: dict[str, list[tuple[Any, Slot]]] = {}
  for name in required:
    for slot in slots[name]:
      sources.setdefault(slot.row.path, []).append((state_dict[name], slot))
  return {
    path: Parameter(shapes[path], jax.dtypes.canonicalize_dtype(jnp.promote_types(found[0][0].dtype, least)), found)
    for path, found in sources.items()
  }


def _layout(name: str, model: nn.Module) -> Layout:
  if name not in LAYOUTS:
    raise WeightsError(f"there is no layout {name!r}; there are {', '.join(LAYOUTS)}.")
  if not isinstance(model, LAYOUTS[name].modules):
    fitting = ", ".join(other for other, layout in LAYOUTS.items() if isinstance(model, layout.modules))
    raise WeightsError(f"layout {name!r} does not hold a {type(model).__name__}; these do: {fitting}.")
  return LAYOUTS[name]


def _backbone_only(state_dict: Mapping[str, Any], table: Layout) -> Mapping[str, Any]:
  outside = [name for name in state_dict if name.startswith(table.outside)]
  if outside:
    _log.info("Not part of the backbone, not loaded: %s.", ", ".join(outside))
  return {name: value for name, value in state_dict.items() if name not in outside}


def model_shapes(model: nn.Module, width: int = 1) -> dict[str, Shape]:
  """Shapes of all parameters of a model by path; `width` is the input of a head.

  Raises:
    WeightsError: if its attributes do not make a model.
  """
  if isinstance(model, ProjectionHead):
    example = jax.ShapeDtypeStruct((1, width), jnp.float32)
  else:
    example = jax.ShapeDtypeStruct((1, model.stride, model.stride, model.in_channels), jnp.float32)
  try:
    variables = jax.eval_shape(model.init, jax.random.key(0), example)
  except (ValueError, TypeError, ArithmeticError) as error:  # of attributes out of a file, of whatever values
    raise WeightsError(f"its attributes make no {type(model).__name__}: {error}") from error
  return {path: leaf.shape for path, leaf in flatten_dict(variables["params"], sep="/").items()}


def _input_width(state_dict: Mapping[str, Any], table: Layout, model: nn.Module) -> int:
  """The input width of a head, which its attributes do not say."""
  name = next((row.name for row in table.rows(model) if row.path == "fc1/kernel"), None)
  return np.shape(state_dict[name])[-1] if name in state_dict and np.ndim(state_dict[name]) == 2 else 1


def _slots(table: Layout, layout: str, model: nn.Module, shapes: Mapping[str, Shape]) -> dict[str, list[Slot]]:
  """What every tensor of the file holds: one parameter, or the chunks of several."""
  slots: dict[str, list[Slot]] = {}
  covered = set()
  for row in table.rows(model):
    if row.path not in shapes:
      continue
    covered.add(row.path)
    stacked = STACKED.search(row.path) is not None
    shape = shapes[row.path][1:] if stacked else shapes[row.path]
    if row.part is not None:
      shape = shape[: row.part[0]] + shape[row.part[0] + 1 :]
    for layer in range(shapes[row.path][0]) if stacked else (None,):
      slots.setdefault(row.name.format(i=layer), []).append(Slot(row, layer, shape))
  uncovered = sorted(set(shapes) - covered)
  if uncovered:
    raise WeightMismatch(f"layout {layout!r} has no place for {', '.join(uncovered)}: {table.hint}.")
  return slots


def _compare(
  found: Mapping[str, Any], expected: Mapping[str, Shape], optional: Mapping[str, Shape] | None = None
) -> list[str]:
  problems = [f"  missing: {name} {shape}" for name, shape in expected.items() if name not in found]
  allowed = {**(optional or {}), **expected}
  for name, value in found.items():
    shape = "(a dict)" if isinstance(value, Mapping) else tuple(np.shape(value))
    if name not in allowed:
      problems.append(f"  extra: {name} {shape}")
    elif shape != allowed[name]:
      problems.append(f"  shape: {name} is {shape}, expected {allowed[name]}")
    elif not jnp.issubdtype(value.dtype, jnp.floating):
      problems.append(f"  type: {name} is {value.dtype}, expected floating-point numbers")
  return problems


def _condensed(problems: list[str]) -> list[str]:
  """The same with one line for what is wrong in the same way with more than three blocks."""
  groups: dict[str, list[str]] = {}
  for problem in problems:
    groups.setdefault(re.sub(r"\.\d+\.", ".{i}.", problem, count=1), []).append(problem)
  lines = []
  for kind, members in groups.items():
    numbers = [int(match[1]) for member in members if (match := re.search(r"\.(\d+)\.", member))]
    if len(members) > 3:
      lines.append(f"{kind}, for {len(members)} i from {min(numbers)} to {max(numbers)}")
    else:
      lines += members
  return lines


def _contradictions(found: Mapping[str, Any], buffers: Mapping[str, Buffer]) -> list[str]:
  """The buffers of the file that have the right shape and other values than those of the model."""
  problems = []
  for name, buffer in buffers.items():
    if name not in found or np.shape(found[name]) != buffer.value.shape:
      continue
    value = np.asarray(found[name], np.float64)
    if np.allclose(value, buffer.value, rtol=buffer.rtol, atol=0.0):
      continue
    worst = int(np.nanargmax(np.where(np.isnan(value), math.inf, abs(value - buffer.value))))
    problems.append(
      f"  value: {name}[{worst}] is {value[worst]:.6g}, expected {buffer.value[worst]:.6g} ({buffer.meaning})"
    )
  return problems


def _prefix_hint(state_dict: Mapping[str, Any], slots: Mapping[str, list[Slot]]) -> str:
  for name, value in state_dict.items():
    if isinstance(value, Mapping):
      return f"\nThe weights may be inside: pass weights.select(state_dict, {name!r})."
    for wanted in ("cls_token", "embeddings.cls_token", "last_layer.weight"):
      if wanted in slots and name != wanted and name.endswith("." + wanted):
        return f"\nThe names have a prefix: pass weights.select(state_dict, {name[: -len(wanted)]!r})."
  return ""
