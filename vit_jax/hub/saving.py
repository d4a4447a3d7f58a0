"""Saving models in the formats of others, and in our own."""

from __future__ import annotations

import functools
import json
import logging
import os
import pathlib
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from vit_jax import weights
from vit_jax.checkpoints import trees
from vit_jax.data.framing import CROP_RATIO, standard
from vit_jax.hub.errors import UnknownModel
from vit_jax.hub.opening import Backbone
from vit_jax.hub.positions import as_resized_by, class_position_in_its_token
from vit_jax.models import ConvNeXt
from vit_jax.weights import dinov2, record, timm
from vit_jax.weights.families import family_of_model
from vit_jax.weights.files import (
  INDEX,
  MAX_SHARD_SIZE,
  SHARDS,
  SINGLE,
  read_metadata,
  write_safetensors,
  write_sharded,
)
from vit_jax.weights.opening import CONFIG, PREPROCESSOR
from vit_jax.weights.preprocessor import Frame, to_preprocessor
from vit_jax.weights.pth import read_extra, write_pth
from vit_jax.weights.record import MODEL, PARAMS

_log = logging.getLogger(__name__)


class _Export(NamedTuple):
  """What a format writes besides the model, and where it will be."""

  target: pathlib.Path
  image_size: int
  preprocessor: dict[str, Any] | None
  max_shard_size: int
  strict: bool


def save_model(
  path: str | os.PathLike,
  model: Backbone,
  params: Mapping[str, Any],
  format: str = "safetensors",
  *,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  image_size: int = 224,
  value_range: Sequence[float] | None = None,
  crop_ratio: float | None = None,
  preprocessor: Mapping[str, Any] | None = None,
  max_shard_size: int = MAX_SHARD_SIZE,
  overwrite: bool = False,
  strict: bool = False,
) -> None:
  """Saves a model so that others, and `load_model`, open it. What is there is complete or not there.

  Args:
    path: a folder; for "pth" and "timm" a file. An earlier export of the same format there is replaced, anything
      else is left alone.
    model: the module.
    params: its parameters.
    format: "safetensors": a folder for `transformers.AutoModel.from_pretrained`; "pth": a flat file as the
      DINOv3 or DINOv2 repository loads it; "timm": a .safetensors file with timm's names, without classifier;
      "orbax": a folder that holds any model of vit_jax exactly.
    mean: of every channel, with which images are normalised. With std it is stored with the weights: as
      preprocessor_config.json in a folder, and in a single file where others pass over it.
    std: the standard deviations that belong to mean.
    image_size: nominal side of the images, written to the configuration.
    crop_ratio: side of the centre crop over the short side of the resized image, in evaluations (None: 224 / 256);
      stored beside mean and std.
    preprocessor: content of a preprocessor_config.json that is stored as it is, instead of one from mean and std.
    value_range: of images that do not have 8 bits (`data.value_range`); stored beside mean and std.
    max_shard_size: bytes of one file of weights; a larger model becomes several and an index ("safetensors").
    overwrite: replace any file, and a model of any format in a folder, as well.
    strict: refuse what others compute in another way at some image sizes: they resize learned positions in their own
      way. Else a warning of the log says how large the difference is.

  What only training uses (`local_cls_norm` of the 7B, in the formats of Hugging Face and timm) is left out, with a
  warning.

  Raises:
    WeightsError: if the format cannot express the model (names the attribute and the formats that can), or the
      parameters are not the model's.
    UnknownModel: for an unknown format, or a path where something else is.
  """
  if format not in _WRITERS:
    raise UnknownModel(f"there is no format {format!r}; there are {', '.join(_WRITERS)}.")
  if (mean is None) != (std is None):
    raise UnknownModel(f"mean and std belong together, got mean={mean} and std={std}.")
  if mean is not None and not len(mean) == len(std) == model.in_channels:
    raise UnknownModel(f"mean={mean} and std={std} must have an entry for each of {model.in_channels} channels.")
  path = pathlib.Path(path).expanduser()
  if preprocessor is None and mean is not None:
    preprocessor = to_preprocessor(mean, std, _frame(image_size, crop_ratio), value_range)
  target = check_place(path, format, overwrite=overwrite)
  unfinished = path.with_name(f".{path.name}.unfinished.{os.getpid()}")
  try:
    _WRITERS[format](unfinished, model, params, _Export(target, image_size, preprocessor, max_shard_size, strict))
    _flush(unfinished)
    _replace(unfinished, target)
  finally:
    _remove(unfinished)


def _frame(image_size: int, crop_ratio: float | None) -> Frame:
  """What evaluations do with images, for a preprocessor_config.json."""
  framing = standard(image_size, crop_ratio or CROP_RATIO)
  return Frame(framing.resize, framing.crop, framing.resample)


def _with_masking(
  model: Backbone, params: Mapping[str, Any], masking: bool, target: pathlib.Path
) -> tuple[Backbone, dict[str, Any]]:
  """The same model with a mask token or without: what a format needs. It has no influence unless there are masks."""
  params = dict(params)
  if isinstance(model, ConvNeXt) or model.masking == masking:
    return model, params
  if masking:
    params["mask_token"] = jnp.zeros((model.width,), model.param_dtype)
    _log.info("Added to %s: a mask token of zeros, which its format always has.", target)
  else:
    del params["mask_token"]
    _log.info("Left out of %s: the mask token, which its format does not have.", target)
  return model.clone(masking=masking), params


def _without_local_norm(
  model: Backbone, params: Mapping[str, Any], target: pathlib.Path
) -> tuple[Backbone, dict[str, Any]]:
  """The model without the norm of local crops, for which others have no place and features no use."""
  if not getattr(model, "separate_local_cls_norm", False):
    return model, dict(params)
  _log.warning("Left out of %s: local_cls_norm, which only training uses (formats pth and orbax keep it).", target)
  return model.clone(separate_local_cls_norm=False), {k: v for k, v in params.items() if k != "local_cls_norm"}


def _resized_there(
  who: str,
  resizing: Mapping[str, Any],
  model: Backbone,
  params: Mapping[str, Any],
  export: _Export,
  *,
  lost: bool = False,
) -> Backbone:
  """See `as_resized_by`."""
  if isinstance(model, ConvNeXt):
    return model
  how = dict(image_size=export.image_size, strict=export.strict, target=export.target, lost=lost)
  return as_resized_by(who, resizing, model, params, **how)


def _write_safetensors(path: pathlib.Path, model: Backbone, params: Mapping[str, Any], export: _Export) -> None:
  model, params = _without_local_norm(model, params, export.target)
  if getattr(model, "rope", None) is not None and model.rope.dtype != "float32":
    _log.info("Rotary tables of %s become float32 in the export, as in the published models.", model.rope.dtype)
  family = family_of_model(model)
  if family.masking is not None:
    model, params = _with_masking(model, params, family.masking, export.target)
  if family.resizing is not None:
    model = _resized_there("Hugging Face", family.resizing(model), model, params, export, lost=True)
  config = family.to_config(model, export.image_size)
  state_dict = weights.lazy_state_dict(params, model, family.layout)
  path.mkdir(parents=True)
  write_sharded(path, state_dict, export.max_shard_size)
  _write_json(path / CONFIG, config)
  if export.preprocessor is not None:
    _write_json(path / PREPROCESSOR, export.preprocessor)


def _write_pth(path: pathlib.Path, model: Backbone, params: Mapping[str, Any], export: _Export) -> None:
  layout = "dinov3" if isinstance(model, ConvNeXt) or model.position_table is None else "dinov2"
  model, params = _with_masking(model, params, True, export.target)
  if layout == "dinov2":
    _resized_there("The DINOv2 repository", dinov2.resizing(model.num_registers), model, params, export)
  state_dict = weights.lazy_state_dict(params, model, layout)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_pth(path, state_dict, _texts(model, layout, export))


def _write_timm(path: pathlib.Path, model: Backbone, params: Mapping[str, Any], export: _Export) -> None:
  model, params = _without_local_norm(model, params, export.target)
  model, params = _with_masking(model, params, False, export.target)
  if not isinstance(model, ConvNeXt):
    model, params = class_position_in_its_token(model, params, export.target)
    _resized_there("timm", timm.RESIZING, model, params, export)
  state_dict = weights.lazy_state_dict(params, model, "timm")
  path.parent.mkdir(parents=True, exist_ok=True)
  write_safetensors(path, state_dict, _texts(model, "timm", export))


def _texts(model: Backbone, layout: str, export: _Export) -> dict[str, str]:
  """What a single file says besides its tensors, where others pass over it."""
  own = {MODEL: record.to_text(model, layout)}
  return own if export.preprocessor is None else own | {PREPROCESSOR: json.dumps(export.preprocessor)}


def _write_orbax(path: pathlib.Path, model: Backbone, params: Mapping[str, Any], export: _Export) -> None:
  weights.check_parameters(params, model)
  path.mkdir(parents=True)
  _write_json(path / MODEL, {"module": type(model).__name__, "attributes": record.to_json(model)})
  trees.write_tree(path / PARAMS, params, text=(path / MODEL).read_text())
  if export.preprocessor is not None:
    _write_json(path / PREPROCESSOR, export.preprocessor)


_WRITERS = {"safetensors": _write_safetensors, "pth": _write_pth, "timm": _write_timm, "orbax": _write_orbax}
_FILES = ("pth", "timm")  # formats that are one file


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def check_place(path: str | os.PathLike, format: str, *, overwrite: bool = False) -> pathlib.Path:
  """The path, if `save_model` may put an export of this format there: for whoever wants to know before the work.

  Raises:
    UnknownModel: if something else is there, or the format goes by another name.
  """
  path = pathlib.Path(path).expanduser()
  if format == "timm" and path.suffix != ".safetensors":  # by which timm, and load_model, know what is in it
    raise UnknownModel(f'{path}: a file of format "timm" is named …safetensors: {path.name}.safetensors.')
  if format in _FILES:
    if path.is_dir():
      raise UnknownModel(f"{path} is a folder; this format writes a file.")
    if path.exists() and not path.is_file():
      raise UnknownModel(f"{path} is a device or a pipe; give a file to write.")
    if path.exists() and not overwrite and path.stat().st_size and not _is_own_file(path, format):
      raise UnknownModel(
        f"{path} is there and no export of vit_jax in format {format!r}: choose another name, or replace it "
        "with --overwrite (overwrite=True)."
      )
    return path
  if path.is_dir():
    _check_folder(path, format, overwrite)
  elif path.exists():
    raise UnknownModel(f"{path} is no folder; this format writes one.")
  elif path.suffix in (".safetensors", ".pth"):
    raise UnknownModel(
      f"{path}: format {format!r} writes a folder: name it {path.stem}, or choose a format that is one file, "
      f"{' or '.join(_FILES)}."
    )
  return path


def _check_folder(path: pathlib.Path, format: str, overwrite: bool) -> None:
  known = (SINGLE, INDEX, SHARDS, CONFIG, PREPROCESSOR, MODEL, PARAMS, trees.SEAL)
  strangers = sorted(entry.name for entry in path.iterdir() if not any(map(entry.match, known)))
  if strangers:
    raise UnknownModel(
      f"{path} holds other things than an exported model ({', '.join(strangers[:3])}): choose another."
    )
  other = CONFIG if format == "orbax" else MODEL
  if (path / other).exists() and not overwrite:
    raise UnknownModel(
      f"{path} holds a model in another format than {format!r} (it has {other}): choose another folder, or replace it "
      "with --overwrite (overwrite=True)."
    )


def _is_own_file(path: pathlib.Path, format: str) -> bool:
  """Whether a file has one of the texts that exports of this format have."""
  try:
    find = functools.partial(read_extra, path) if format == "pth" else read_metadata(path).get
    return any(find(name) is not None for name in (MODEL, PREPROCESSOR))
  except (weights.WeightsError, zipfile.BadZipFile):
    return False


def _flush(path: pathlib.Path) -> None:
  """Brings a file, or all files of a folder, to the disk: a name must not outlive its content in a power cut."""
  for file in [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]:
    with file.open("rb") as handle:
      os.fsync(handle.fileno())


def _replace(unfinished: pathlib.Path, target: pathlib.Path) -> None:
  if not target.is_dir():
    os.replace(unfinished, target)
    return
  old = target.with_name(f".{target.name}.old.{os.getpid()}")  # folders cannot be replaced in one step
  os.replace(target, old)
  os.replace(unfinished, target)
  _remove(old)


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)
