"""Opening models, whatever wrote them: runs, the DINO repositories, Hugging Face, timm, vit_jax."""

from __future__ import annotations

import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vit_jax import checkpoints, parallel, weights
from vit_jax.checkpoints import trees
from vit_jax.checkpoints.tree import Placement
from vit_jax.hub.errors import UnknownModel
from vit_jax.models import ConvNeXt, PositionTable, VisionTransformer
from vit_jax.weights import hub_cache, record
from vit_jax.weights.errors import about
from vit_jax.weights.files import SINGLE
from vit_jax.weights.grids import Given, ImageSize, with_grid
from vit_jax.weights.opening import CONFIG, holds_weights, newest_step, open_weights
from vit_jax.weights.record import MODEL, PARAMS

Backbone = VisionTransformer | ConvNeXt
Opener = Callable[[pathlib.Path, dict[str, Any], Given, Placement | None], tuple[Backbone, dict]]

_log = logging.getLogger(__name__)


def load_model(
  path: str | os.PathLike,
  *,
  mesh: jax.sharding.Mesh | None = None,
  image_size: int | tuple[int, int] | None = None,
  **overrides: Any,
) -> tuple[Backbone, dict[str, Any]]:
  """Opens a model: its module and its parameters, on the default device or spread over those of a mesh.

  Of a weights file, one parameter is in the memory of the host at a time; with a mesh, one shard of one. What leaves
  no trace in a file of others (often num_heads, always norm_eps) is assumed, and a warning of the log says so.

  Args:
    path: the workdir of a run (the teacher of its newest step), one of its step folders, `students/NAME` in either
      where a run has several students, a file of torch (.pth, .pt, .bin, .ckpt) or safetensors with a backbone of
      DINOv3, DINOv2 or timm, whatever its training wrapped around it (the architecture is inferred; the averaged
      network is taken, `FILE#student.backbone` says another), a step of a training with torch.distributed.checkpoint,
      a Hugging Face folder (DINOv3 ViT or ConvNeXt, DINOv2, ViT, distilled DeiT) or its file of weights, or a folder
      that `save_model` wrote; or the name of a model of the Hugging Face Hub, ORG/NAME, that `hf download` has brought
      to this machine.
    mesh: with the axes of `parallel.make_mesh`; parameters are spread by its rules.
    image_size: height and width in pixels of the images that learned positions are for, where a file does not say of
      which grid they are (an int: square images). Images of other sizes get them resized.
    **overrides: attributes of the module that replace what the file says, e.g. `dtype` or `norm_eps`;
      `position_table` may be its grid alone, (rows, columns).

  Raises:
    UnknownModel: if there is nothing that can be opened; says what was looked for.
    WeightsError, NotSaved, Damaged: if what is there cannot be read or does not fit.
  """
  path = locate(path)
  open_it = opener(path)
  if open_it is None:
    raise UnknownModel(
      f"{path} is no model: expected a run's workdir (with {checkpoints.FOLDER}/) or one of its steps, a .pth file, a "
      f"safetensors file, or a folder with {SINGLE} and {CONFIG}, with {MODEL}, or of torch.distributed.checkpoint. "
      f"{_what_is_there(path)}"
    )
  given, overrides = _given_table(image_size, overrides)
  model, params = open_it(path, overrides, given, None if mesh is None else parallel.parameter_sharding(mesh))
  return model, jax.tree.map(jnp.asarray, params)


def locate(path: str | os.PathLike) -> pathlib.Path:
  """The path itself, or where the model of the Hugging Face Hub is that it names.

  Raises:
    UnknownModel: if that is not on this machine; says how it comes here.
  """
  try:
    return hub_cache.locate(path)
  except weights.WeightsError as error:
    raise UnknownModel(str(error)) from error


def _given_table(image_size: int | tuple[int, int] | None, overrides: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
  """What is said of a table of positions, and the overrides; a whole table is one of them, too."""
  table = overrides.get("position_table")
  if image_size is not None and table is not None:
    raise UnknownModel(f"image_size={image_size} and position_table={table} both say the grid: give one of them.")
  if image_size is not None:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
      raise UnknownModel(f"image_size={image_size!r}: must be the height and width in pixels, such as (224, 256).")
    return ImageSize(*sides), overrides
  if isinstance(table, list | tuple):
    if len(table) != 2 or not all(isinstance(side, int) and side > 0 for side in table):
      raise UnknownModel(f"position_table={table!r}: must be a PositionTable, or its grid, such as (14, 16).")
    return tuple(table), {name: value for name, value in overrides.items() if name != "position_table"}
  return (table if table is not None and table.kind == "learned" else None), overrides


def opener(path: pathlib.Path) -> Opener | None:
  if checkpoints.find(path) is not None:
    return open_run
  if (path / MODEL).exists():
    return _open_own
  return _open_file if holds_weights(path) else None


def _what_is_there(path: pathlib.Path) -> str:
  if not path.exists():
    return "There is nothing of this name."
  if not path.is_dir():
    return "It is no regular file."
  names = sorted(entry.name for entry in path.iterdir())
  there = (
    f"The folder has {', '.join(names[:8])}{', …' if len(names) > 8 else ''}." if names else "The folder is empty."
  )
  if (step := newest_step(path)) is not None:
    return f"{there} The newest step in it is {step}: give that."
  torch = next((name for name in names if name.endswith((".bin", ".pth", ".pt", ".ckpt", ".safetensors"))), None)
  return there if torch is None else f"{there} Of a file like {torch}, give the path of the file itself."


def open_run(
  path: pathlib.Path, overrides: dict[str, Any], given: Given, sharding: Placement | None
) -> tuple[Backbone, dict]:
  from vit_jax import config, methods  # heavy: a model file needs neither
  from vit_jax.config.students import config_at

  address = checkpoints.find(path)
  saved = config.from_dict(checkpoints.read_meta(address.workdir, step=address.step)["config"])
  try:
    model = methods.backbone(config_at(saved, address))
    if getattr(model, "quantization", None):  # for the speed of training; features are wanted in full
      overrides = {"quantization": None} | overrides
    _check_grid(path, getattr(model, "position_table", None), given, model.stride)
    model = model.clone(**overrides)
  except ValueError as error:
    raise UnknownModel(f"{path}: {error}.") from error
  tree = checkpoints.restore_params(address.workdir, (*address.place, "backbone"), address.step, sharding)
  return model, tree


def _open_own(
  path: pathlib.Path, overrides: dict[str, Any], given: Given, sharding: Placement | None
) -> tuple[Backbone, dict]:
  module, attributes = record.read_own(path / MODEL)
  _check_grid(path, attributes.get("position_table"), given, attributes.get("patch_size", 1))
  model = module(**(attributes | overrides))
  record.check_shapes(path / MODEL, model, trees.shapes(path / PARAMS))
  return model, trees.read_tree(path / PARAMS, sharding, text=(path / MODEL).read_text())


def _check_grid(path: pathlib.Path, table: PositionTable | None, given: Given, patch_size: int) -> None:
  """What we saved says its grid: another one can only be a mistake; a whole table is an override like others."""
  if isinstance(given, PositionTable) and table is not None:
    return
  try:
    wanted = with_grid(table, given, patch_size)
  except weights.WeightsError as error:
    raise UnknownModel(f"{path}: {error}") from error
  if wanted != table:
    raise UnknownModel(f"{path} has learned positions of a grid of {table.grid}, not {wanted.grid}: leave it out.")


def _open_file(
  path: pathlib.Path, overrides: dict[str, Any], given: Given, sharding: Placement | None
) -> tuple[Backbone, dict]:
  opened = open_weights(path, given=given)
  found = opened.backbone
  if found.attributes.get("position_table") is None:
    _check_grid(path, None, given, found.attributes.get("patch_size", 1))
  # A whole table is among the attributes, for the tokens that have a position.
  inside = {"position_table"} if isinstance(given, PositionTable) else set()
  model = found.module(**(found.attributes | {k: v for k, v in overrides.items() if k not in inside}))
  try:
    model.check()
  except ValueError as error:
    raise weights.WeightsError(f"{path}: {error}") from error
  if opened.inferred:
    _log.info("%s: inferred %s.", path, _describe(model, found.attributes))
    _say_what_was_assumed(path, {k: v for k, v in found.assumed.items() if k.partition(".")[0] not in overrides})
  with about(path):
    return model, weights.from_state_dict(opened.tensors["backbone"], model, found.layout, sharding=sharding)


def _say_what_was_assumed(path: pathlib.Path, assumed: Mapping[str, Any]) -> None:
  if not assumed:
    return
  others = ", ".join(dict.fromkeys(f"{name.partition('.')[0]}=…" for name in assumed))
  values = ", ".join(f"{name}={value!r}" for name, value in assumed.items())
  _log.warning("%s: not in the file, assumed: %s. Others are given by load_model(path, %s).", path, values, others)


def _describe(model: Backbone, inferred: Mapping[str, Any]) -> str:
  first = [name for name in ("patch_size", "width", "depth", "num_heads", "mlp") if name in inferred]
  named = (f"{name}={getattr(model, name)!r}" for name in dict.fromkeys([*first, *inferred]))
  return f"{type(model).__name__}({', '.join(named)})"
