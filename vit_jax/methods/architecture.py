"""What an architecture is, beyond the shapes of its parameters: comparing two, and the config keys that give one."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn

from vit_jax.models import MODELS, create_model

# Attributes without a part in what the parameters mean; that of the last one shows in their shapes.
_FREE = ("parent", "name", "init_std", "drop_path", "dtype", "param_dtype", "remat", "unroll", "masking")
_FREE += ("quantization", "separate_local_cls_norm")
_ROPE = ("base", "min_period", "max_period", "normalize")  # attributes of the rotary positions that have one
_TABLE = ("prefix", "antialias", "offset")  # the same of learned positions


def attributes(model: nn.Module) -> dict[str, Any]:
  """What gives the parameters of a model their meaning, by dotted name."""
  names = [field.name for field in dataclasses.fields(model) if field.name not in _FREE]
  values = {name: getattr(model, name) for name in names}
  if "mlp_hidden" in values:
    values["mlp_hidden"] = model.mlp_hidden or 4 * model.width
  if "mask_k_bias" in values:
    values["mask_k_bias"] = model.mask_k_bias and model.qkv_bias  # a bias that is not there has none to mask
  values["layer_scale"] = values["layer_scale"] is not None  # its value is only where training starts
  if "rope" in values:
    values |= _positions(model, values.pop("rope"), values.pop("position_table"))
  return values


def _positions(model: Any, rope: Any, table: Any) -> dict[str, Any]:
  """Rotary and absolute positions in the terms of `config.model`."""
  kinds = (["rope"] if rope is not None else []) + ([table.kind] if table is not None else [])
  found = {"positions": " and ".join(kinds) or "none"}
  found |= {f"rope.{name}": getattr(rope, name, None) for name in _ROPE}
  learned = table if table is not None and table.kind == "learned" else None
  found |= {f"position_table.{name}": getattr(learned, name, None) for name in _TABLE}
  rows, columns = (None, None) if learned is None else learned.grid
  found["position_table.image_size"] = rows * model.patch_size if learned is not None and rows == columns else None
  return found | {"position_table_grid": (rows, columns) if rows != columns else None}  # which no config has


def differences(there: nn.Module, here: nn.Module) -> tuple[list[str], list[str]]:
  """The attributes by which two models make different functions of the same parameters, and those that hardly do."""
  if type(there) is not type(here):
    return [f"a {type(there).__name__} there, a {type(here).__name__} here"], []
  a, b = attributes(there), attributes(here)
  lines = {name: f"{name}: {a[name]!r} there, {b[name]!r} here" for name in a if a[name] != b[name]}
  minor = [lines.pop("norm_eps")] if "norm_eps" in lines else []
  return list(lines.values()), minor


def config_keys(model: nn.Module, config: Any) -> tuple[dict[str, Any], list[str]]:
  """The keys of `config.model` to change for the architecture of `model`, and its attributes that no key reaches."""
  wanted, given = attributes(model), _flat(config.model)
  named = {name: attributes(create_model(name)) for name, (kind, _) in MODELS.items() if isinstance(model, kind)}

  def distance(name: str) -> tuple[int, bool]:
    return sum(wanted[attribute] != value for attribute, value in named[name].items()), name != given["name"]

  best = min(named, key=distance)
  needed: dict[str, Any] = {"name": best}
  beyond = []
  for attribute, value in wanted.items():
    same = value == named[best][attribute]
    if attribute == "layer_scale":  # any value will do where there is one
      value = given["layer_scale"] or model.layer_scale if value else None
    if same:
      needed[attribute] = value if given.get(attribute) is not None else None  # None: that of the named model
    elif attribute in given and value is not None:
      needed[attribute] = value
    elif attribute.startswith(("rope.", "position_table.")):  # they go with the kind of positions
      needed[attribute] = None
    else:
      beyond.append(f"{attribute}={value!r}")
  if needed.get("width") is not None and "mlp_hidden" in wanted:  # which would be scaled with it
    needed["mlp_hidden"] = wanted["mlp_hidden"]
  if getattr(model, "separate_local_cls_norm", False) and not create_model(best).separate_local_cls_norm:
    needed["separate_local_cls_norm"] = True
  fields = {*type(model).__dataclass_fields__, *wanted}
  needed |= {name: None for name in given if name.partition(".")[0] not in fields and name != "name"}
  return {f"model.{name}": value for name, value in needed.items() if given.get(name) != value}, beyond


def _flat(section: Any) -> dict[str, Any]:
  """The values of `config.model` by dotted name."""
  flat = {}
  for name, value in section.items():
    flat |= {f"{name}.{key}": inner for key, inner in value.items()} if hasattr(value, "items") else {name: value}
  return flat
