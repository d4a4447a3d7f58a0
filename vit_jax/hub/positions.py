"""Learned positions in the formats of others, who resize them in ways of their own for images of other sizes."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vit_jax.models import PositionTable, VisionTransformer
from vit_jax.weights import WeightsError

_SCALES = (0.5, 0.75, 1.5)  # of the grid of a table: those at which a difference is measured

_log = logging.getLogger(__name__)


def as_resized_by(
  who: str,
  resizing: Mapping[str, Any],
  model: VisionTransformer,
  params: Mapping[str, Any],
  *,
  image_size: int,
  strict: bool,
  target: pathlib.Path,
  lost: bool,
) -> VisionTransformer:
  """The model with its positions resized as others resize them, and the size of the difference said.

  Args:
    who: resizes them so, for people.
    resizing: the attributes of a `PositionTable` that say how.
    model: to save.
    params: its parameters.
    image_size: one of the sizes at which the difference is measured.
    strict: refuse a difference.
    target: where it will be saved, for people.
    lost: whether what is saved does not say how they are to be resized: a warning, else the log says it.

  Raises:
    WeightsError: if there is a difference and it is to be refused.
  """
  table = model.position_table
  if table is None or table.kind != "learned":
    return model
  theirs = dataclasses.replace(table, **resizing)
  if theirs == table:
    return model
  difference, largest, size = _difference(table, theirs, model, params, image_size)
  changed = ", ".join(f"{name}={value!r} for {getattr(table, name)!r}" for name, value in resizing.items()
                      if getattr(table, name) != value)  # fmt: skip
  native = " x ".join(str(side * model.patch_size) for side in table.grid)
  said = (
    f"{who} resizes learned positions in another way (position_table: {changed}). At {native} pixels nothing changes; "
    f"at other sizes positions differ by up to {difference:.2g}, {difference / largest:.1%} of the largest (at {size})"
  )
  if strict:
    raise WeightsError(f'{said}: refused, as strict=True (--strict) asks. format="orbax" keeps the model as it is.')
  _log.log(logging.WARNING if lost else logging.INFO, "%s: %s.", target, said)
  return model.clone(position_table=theirs)


def _difference(
  ours: PositionTable, theirs: PositionTable, model: VisionTransformer, params: Mapping[str, Any], image_size: int
) -> tuple[float, float, str]:
  """The largest difference of a resized position, the largest position, and the image size where it is."""
  front = ours.prefix_length(model.class_token, model.num_registers)
  patches = jnp.asarray(params["positions"], jnp.float32)[front:]  # [N, D]
  grids = {tuple(max(1, round(scale * side)) for side in ours.grid) for scale in _SCALES}
  grids |= {(max(1, image_size // model.patch_size),) * 2}
  found = {
    grid: float(jnp.abs(ours.resize(patches, grid) - theirs.resize(patches, grid)).max()) for grid in sorted(grids)
  }
  worst = max(found, key=found.get)
  size = " x ".join(str(side * model.patch_size) for side in worst)
  return found[worst], max(float(jnp.abs(patches).max()), 1e-30), size


def class_position_in_its_token(
  model: VisionTransformer, params: Mapping[str, Any], target: pathlib.Path
) -> tuple[VisionTransformer, dict[str, Any]]:
  """Where registers have no position and the class token has: the sum of it and its position, as timm has it.

  timm gives positions to all tokens before the patches or to none (no_embed_class); the features are the same.
  """
  table, params = model.position_table, dict(params)
  if table is None or (table.kind, table.prefix) != ("learned", "cls"):
    return model, params
  if not (model.class_token and model.num_registers):
    return model, params
  params["cls_token"] = params["cls_token"] + params["positions"][0]
  params["positions"] = params["positions"][1:]
  _log.info("Added in %s: the position of the class token to the token itself, as timm has it.", target)
  return model.clone(position_table=dataclasses.replace(table, prefix="none")), params
