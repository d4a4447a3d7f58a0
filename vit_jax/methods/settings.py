"""From configuration values to the objects that methods share: the backbone and the schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from vit_jax.models import ConvNeXt, PositionTable, Rope, VisionTransformer, create_model
from vit_jax.ops.quantized import why_slow
from vit_jax.optim.schedules import Schedule

TRUNCATED = ("lr", "weight_decay", "momentum")  # schedules of which `schedules.truncate` speaks


def build_backbone(config: Any) -> VisionTransformer | ConvNeXt:
  """The model of `config.model`: the named one with the keys that are set overriding its attributes.

  Raises:
    ValueError: for an unknown name, or attributes that do not fit together.
  """
  settings, named = config.model, create_model(config.model.name)
  rope, table = (_given(settings[section]) for section in ("rope", "position_table"))
  given = _given(settings, without=("name", "rope", "position_table", "positions"))
  known = set(type(named).__dataclass_fields__) | ({"positions"} if isinstance(named, VisionTransformer) else set())
  asked = {"rope": rope, "position_table": table, "positions": settings.positions}
  for key in [*given, *(key for key, value in asked.items() if value)]:
    if key not in known:
      raise ValueError(f"model.{key}: {settings.name} is a {type(named).__name__}, which has no such attribute.")
  if "width" in given and "mlp_hidden" not in given:
    given["mlp_hidden"] = named.mlp_hidden * given["width"] // named.width
  if not isinstance(named, ConvNeXt):
    patch_size = given.get("patch_size", named.patch_size)
    given |= _positions(named, settings.positions, rope, table, config.crops.global_size, patch_size)
    given["masking"] = True  # plain ViTs have no mask token by default
  model = named.clone(**given)
  try:
    model.check()
  except ValueError as error:
    raise ValueError(f"model.{error}") from error
  return model


def slow_quantization(config: Any) -> str | None:
  """Why `model.quantization` gains nothing on this process's devices; None: it is off, or they have such products."""
  kind = config.model.quantization
  return why_slow(kind) if kind else None


def _given(section: Any, without: Collection[str] = ()) -> dict[str, Any]:
  """The keys of a section that are set."""
  return {key: value for key, value in section.items() if value is not None and key not in without}


def _positions(
  named: VisionTransformer,
  kind: str | None,
  rope: dict[str, Any],
  table: dict[str, Any],
  image_size: int,
  patch_size: int,
) -> dict[str, Any]:
  """The attributes of a ViT that say where tokens are, as far as they are not those of the named model.

  Args:
    kind: "rope", "learned", "sincos", "none", or None: the named model's.
    rope, table: the settings of rotary and learned positions that are given.
    image_size: of a table that the named model does not have, unless the settings say another.
    patch_size: pixels of a side of a patch.
  """
  found: dict[str, Any] = {}
  if "min_period" in rope or "max_period" in rope:
    rope = {"base": None} | rope
  if rope or kind == "rope":
    found["rope"] = dataclasses.replace(named.rope or Rope(), **rope)
  if table or kind == "learned":
    own = named.position_table if named.position_table and named.position_table.kind == "learned" else None
    side = table.pop("image_size", None) or (None if own else image_size)
    grid = {} if side is None else {"grid": (side // patch_size,) * 2}
    found["position_table"] = dataclasses.replace(own or PositionTable(), **grid, **table)
  if kind == "sincos":
    found["position_table"] = PositionTable(kind="sincos")
  if kind is not None:
    found = {"rope": None, "position_table": None} | found
  return found


def num_steps(duration: str) -> int:
  """The steps of a resolved duration, "N steps".

  Raises:
    ValueError: if the duration has another unit: the config must be resolved first (vit_jax.config.resolve).
  """
  number, unit = duration.split()
  if unit != "steps":
    raise ValueError(f"{duration!r} is not resolved to steps.")
  return int(number)


def build_schedules(config: Any, lr_factor: float) -> dict[str, Schedule]:
  """The schedules of a resolved config by name; the learning rate multiplied by `lr_factor`.

  Version 1 scales its peak only, version 2 peak and end (reference section 5.3).
  """
  total, version = num_steps(config.duration), config.schedules.version
  schedules = {}
  for name, values in config.schedules.items():
    if not isinstance(values, ConfigDict):
      continue
    warmup = num_steps(values.warmup)
    cosine = total - warmup if values.cosine is None else num_steps(values.cosine)
    start, peak, end = values.start, values.peak, values.end
    if name == "lr":
      peak, end = peak * lr_factor, end * (lr_factor if version == 2 else 1.0)
    truncate = config.schedules.truncate if name in TRUNCATED else 0.0
    schedules[name] = Schedule(start, peak, end, warmup, cosine, version=version, truncate=truncate)
  return schedules
