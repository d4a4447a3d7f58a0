"""What an export says of its model beside the tensors: attributes that their names and shapes do not tell."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vit_jax.models import ConvNeXt, PositionTable, Rope, VisionTransformer
from vit_jax.weights import bounds
from vit_jax.weights.convert import LAYOUTS, model_shapes, parameter_shapes
from vit_jax.weights.errors import WeightMismatch, WeightsError, about, reading
from vit_jax.weights.infer import Recognised, recognise
from vit_jax.weights.texts import parse_json, read_json

MODEL = "model.json"  # a file of an "orbax" folder, a text within a single file
PARAMS = "params"  # with it, a folder of format "orbax": the arrays

_MODULES = {module.__name__: module for module in (VisionTransformer, ConvNeXt)}
_TYPES = ("dtype", "param_dtype")  # attributes that are array types
_SETTINGS = {"rope": Rope, "position_table": PositionTable}  # attributes that are dataclasses
# How a model is trained and computed, which is the choice of who loads the weights.
_FREE = ("init_std", "drop_path", *_TYPES, "quantization", "remat", "unroll")


def to_json(model: nn.Module) -> dict[str, Any]:
  """The module's attributes as JSON values."""
  names = [field.name for field in dataclasses.fields(model) if field.name not in ("parent", "name")]
  values = {name: getattr(model, name) for name in names}
  values |= {name: str(jnp.dtype(values[name])) for name in _TYPES}
  return values | {
    name: dataclasses.asdict(values[name]) for name in _SETTINGS if name in values and values[name] is not None
  }


def from_json(saved: Mapping[str, Any]) -> tuple[type[nn.Module], dict[str, Any]]:
  """The class and the attributes of a record.

  Raises:
    WeightsError: if it lacks them, or names some that this version does not have.
  """
  try:
    module = _MODULES[saved["module"]]
    attributes = {name: _from_json(name, value) for name, value in saved["attributes"].items()}
    bounds.check_attributes(module, attributes)
    module(**attributes)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    said = str(error).rstrip(".")
    raise WeightsError(f"its {MODEL} describes no model that this version of vit_jax knows: {said}.") from error
  return module, attributes


def read_own(path: pathlib.Path) -> tuple[type[nn.Module], dict[str, Any]]:
  """The class and the attributes that the record of an "orbax" folder says.

  Raises:
    WeightsError: as `from_json`; names the file.
  """
  with about(path.parent):
    return from_json(read_json(path))


def check_shapes(path: pathlib.Path, model: nn.Module, found: Mapping[str, tuple[int, ...]]) -> None:
  """Raises a WeightMismatch that lists the arrays of an "orbax" folder that are not those of the model of its record.

  Args:
    path: the record.
    model: what it describes.
    found: the shapes of the arrays in the folder by path.
  """
  with reading(path), about(path):
    model.check()
    bounds.check_architecture(model, {name: np.broadcast_to(0, shape) for name, shape in found.items()})
    wanted = model_shapes(model)
  lines = [f"  missing: {name} {shape}" for name, shape in wanted.items() if name not in found]
  lines += [f"  extra: {name} {shape}" for name, shape in found.items() if name not in wanted]
  lines += [
    f"  shape: {name} is {found[name]}, expected {shape}"
    for name, shape in wanted.items()
    if name in found and found[name] != shape
  ]
  if lines:
    raise WeightMismatch(
      f"{path.parent}: {len(lines)} arrays are not those of the {type(model).__name__} that {path.name} describes: one "
      "of the two was changed; export the model again:\n" + "\n".join(lines)
    )


def _from_json(name: str, value: Any) -> Any:
  if name in _TYPES:
    return jnp.dtype(value)
  if name in _SETTINGS and value is not None:
    return _SETTINGS[name](**value)
  return tuple(value) if isinstance(value, list) else value


def to_text(model: nn.Module, layout: str) -> str:
  """The record of a model whose tensors have the names of `layout`."""
  attributes = {name: value for name, value in to_json(model).items() if name not in _FREE}
  return json.dumps({"layout": layout, "module": type(model).__name__, "attributes": attributes}, sort_keys=True)


def read_text(text: str, tensors: Mapping[str, Any]) -> Recognised:
  """The model that a record describes, of a file that has these tensors.

  Raises:
    WeightsError: if it cannot be read, or says of an attribute what the tensors refute.
  """
  try:
    saved = parse_json(text, f"its {MODEL}")
    layout = saved["layout"]
  except (WeightsError, KeyError, TypeError) as error:
    raise WeightsError(f"its {MODEL} cannot be read: {error!r}.") from error
  if not isinstance(layout, str) or layout not in LAYOUTS:
    raise WeightsError(f"its {MODEL} says layout={layout!r}; known are {', '.join(LAYOUTS)}.")
  module, attributes = from_json(saved)
  model = module(**attributes)
  try:
    model.check()
  except ValueError as error:
    raise WeightsError(f"its {MODEL} says {error}") from error
  if not _fits(tensors, model, layout):
    _name_contradictions(tensors, model)
  return Recognised(layout, module, attributes, {})


def _fits(tensors: Mapping[str, Any], model: nn.Module, layout: str) -> bool:
  try:
    parameter_shapes(tensors, model, layout)
  except WeightMismatch:
    return False
  return True


def _name_contradictions(tensors: Mapping[str, Any], model: nn.Module) -> None:
  """Raises a WeightsError if the tensors are whole, those of another model.

  Broken ones are no evidence against a record: who reads them lists what is wrong with them.
  """
  try:
    found = recognise(tensors)
    other = found.module(**found.attributes)
    if not _fits(tensors, other, found.layout):
      return
  except (WeightsError, ValueError):
    return
  if type(other) is not type(model):
    names = {"module": (type(model).__name__, type(other).__name__)}
  else:
    said, told = _traces(model, found), _traces(other, found)
    # What has no trace in names and shapes has one in the values of the rotary periods.
    different = [name for name in said if said[name] != told[name]] or ["rope"]
    names = {name: (getattr(model, name), getattr(other, name)) for name in different}
  says = ", ".join(f"{name}={value!r}" for name, (value, _) in names.items())
  tells = ", ".join(f"{name}={value!r}" for name, (_, value) in names.items())
  raise WeightsError(
    f"its {MODEL} says {says}, but its tensors are those of {tells}: one of the two was changed. Export the model "
    "again."
  )


def _traces(model: nn.Module, found: Recognised) -> dict[str, Any]:
  """What names and shapes of tensors tell of the attributes of a model."""
  hidden = {"parent", "name", "norm_eps", *_FREE} | ({"num_heads"} & found.assumed.keys())
  names = [field.name for field in dataclasses.fields(model) if field.name not in hidden]
  values = {name: getattr(model, name) for name in names} | {"layer_scale": model.layer_scale is not None}
  if isinstance(model, ConvNeXt):
    return values | {"patch_size": None}
  return values | {
    "mlp": model.mlp == "swiglu",
    "mlp_hidden": model.mlp_hidden or 4 * model.width,
    "mask_k_bias": model.mask_k_bias and model.qkv_bias,
    "pool": model.pool == "map",
    "rope": found.layout == "dinov3" and model.rope is not None,
    "position_table": _rows(model),
  }


def _rows(model: VisionTransformer) -> int:
  """How many learned positions there are."""
  table = model.position_table
  if table is None or table.kind != "learned":
    return 0
  return table.prefix_length(model.class_token, model.num_registers) + table.grid[0] * table.grid[1]
