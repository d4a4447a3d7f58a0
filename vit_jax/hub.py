"""Opening and saving models, whatever wrote them: runs, the DINO repositories, Hugging Face, timm, vit_jax."""

from __future__ import annotations

import functools
import json
import logging
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_jax import checkpoints, parallel, weights
from vit_jax.checkpoints import trees
from vit_jax.checkpoints.tree import Placement
from vit_jax.models import ConvNeXt, VisionTransformer
from vit_jax.ops.images import normalize_images
from vit_jax.weights import hf_config, record
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
from vit_jax.weights.opening import CONFIG, PREPROCESSOR, open_weights, read_json, read_preprocessor
from vit_jax.weights.pth import read_extra, write_pth
from vit_jax.weights.record import MODEL

PARAMS = "params"  # with MODEL, a folder of format "orbax"

Backbone = VisionTransformer | ConvNeXt

_log = logging.getLogger(__name__)


class UnknownModel(ValueError):
  """A path that holds no model that can be opened, or a place where none can be saved."""


class Preprocessing(NamedTuple):
  """What a model expects of its images: channel means and deviations of values in [0, 1], side in pixels.

  `value_range` is of images that do not have 8 bits, as in `data.value_range`.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]
  image_size: int
  value_range: tuple[float, float] | None = None


class _Export(NamedTuple):
  """What a format writes besides the model, and where it will be."""

  target: pathlib.Path
  image_size: int
  preprocessor: dict[str, Any] | None
  max_shard_size: int


def load_model(
  path: str | os.PathLike, *, mesh: jax.sharding.Mesh | None = None, **overrides: Any
) -> tuple[Backbone, dict[str, Any]]:
  """Opens a model: its module and its parameters, on the default device or spread over those of a mesh.

  Of a weights file, one parameter is in the memory of the host at a time; with a mesh, one shard of one. What leaves
  no trace in a file of others (often num_heads, always norm_eps) is assumed, and a warning of the log says so.

  Args:
    path: the workdir of a run (the teacher of its newest step), one of its step folders, `students/NAME` in either
      where a run has several students, a DINOv3 or DINOv2 `.pth` file (flat or `{"teacher": …}`; the architecture is
      inferred), a Hugging Face folder (DINOv3 ViT or ConvNeXt, DINOv2, ViT, distilled DeiT) or its safetensors file, a
      timm safetensors file (inferred), or a folder that `save_model` wrote.
    mesh: with the axes of `parallel.make_mesh`; parameters are spread by its rules.
    **overrides: attributes of the module that replace what the file says, e.g. `dtype` or `norm_eps`.

  Raises:
    UnknownModel: if there is nothing that can be opened; says what was looked for.
    WeightsError, NotSaved, Damaged: if what is there cannot be read or does not fit.
  """
  path = pathlib.Path(path).expanduser()
  opener = _opener(path)
  if opener is None:
    raise UnknownModel(
      f"{path} is no model: expected a run's workdir (with {checkpoints.FOLDER}/) or one of its steps, a .pth file, a "
      f"safetensors file, or a folder with {SINGLE} and {CONFIG} or with {MODEL}. {_what_is_there(path)}"
    )
  model, params = opener(path, overrides, None if mesh is None else parallel.parameter_sharding(mesh))
  return model, jax.tree.map(jnp.asarray, params)


def load_preprocessing(path: str | os.PathLike, *, channels: int = 3) -> Preprocessing:
  """How images are made ready for the model at `path`: as it was trained, or says itself; else as for ImageNet.

  Raises:
    UnknownModel: if that is not for images of so many channels, which are those of the model.
  """
  found, said = _preprocessing(pathlib.Path(path).expanduser())
  if not len(found.mean) == len(found.std) == channels:
    says = f"says mean={found.mean} and std={found.std}" if said else "does not say with which mean and std"
    raise UnknownModel(
      f"{path} {says}, which does not fit the {channels} channels of the model: convert it from the run that trained "
      f"it, or put a {PREPROCESSOR} with image_mean, image_std and size beside it."
    )
  return found


def load_images(
  files: Sequence[str | os.PathLike], *, like: str | os.PathLike, size: int | None = None
) -> Float[Array, "B S S C"]:
  """Images as the model at `like` takes them: short side resized, centre cropped, normalised; float32.

  Args:
    files: images of any format that a folder of training images may have.
    like: what `load_model` opened.
    size: S, pixels a side; None: as the model says.

  Raises:
    BadImage: naming the file that cannot be read.
    UnknownModel: if there is no model at `like`.
  """
  from vit_jax.data.decode import decode
  from vit_jax.data.evaluation_batches import resize_and_crop
  from vit_jax.data.views import image_channels

  seen, _ = _preprocessing(pathlib.Path(like).expanduser())
  kind = {"channels": image_channels(len(seen.mean)), "value_range": seen.value_range}
  paths = [pathlib.Path(file).expanduser() for file in files]
  images = [resize_and_crop(decode(path, str(path), **kind), size or seen.image_size) for path in paths]
  return normalize_images(jnp.asarray(np.stack(images)), seen.mean, seen.std)


def _preprocessing(path: pathlib.Path) -> tuple[Preprocessing, bool]:
  """The preprocessing of a model, and whether it is stored with it."""
  from vit_jax import config  # heavy, as in _open_run

  if _opener(path) is _open_run:
    workdir, step, _ = checkpoints.find(path)
    c = config.from_dict(checkpoints.read_meta(workdir, step=step)["config"])
    size = c.evaluation.image_size or c.crops.global_size
    return Preprocessing(c.augment.mean, c.augment.std, size, c.data.value_range), True
  if (stored := read_preprocessor(path)) is not None:
    return Preprocessing(*stored), True
  c = config.default()
  return Preprocessing(c.augment.mean, c.augment.std, c.crops.global_size), False


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
  max_shard_size: int = MAX_SHARD_SIZE,
  overwrite: bool = False,
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
    mean, std: per-channel normalisation of the images; both given: stored with the weights, as preprocessor_config.json
      in a folder, and in a single file where others pass over it.
    image_size: nominal side of the images, written to the configuration.
    value_range: of images that do not have 8 bits (`data.value_range`); stored beside mean and std.
    max_shard_size: bytes of one file of weights; a larger model becomes several and an index ("safetensors").
    overwrite: replace any file, and a model of any format in a folder, as well.

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
  preprocessor = None if mean is None else hf_config.to_preprocessor(mean, std, image_size, value_range)
  target = check_place(path, format, overwrite=overwrite)
  unfinished = path.with_name(f".{path.name}.unfinished.{os.getpid()}")
  try:
    _WRITERS[format](unfinished, model, params, _Export(target, image_size, preprocessor, max_shard_size))
    _flush(unfinished)
    _replace(unfinished, target)
  finally:
    _remove(unfinished)


def _opener(path: pathlib.Path) -> Callable[[pathlib.Path, dict, Placement | None], tuple[Backbone, dict]] | None:
  if checkpoints.find(path) is not None:
    return _open_run
  if (path / MODEL).exists():
    return _open_own
  if (path / SINGLE).exists() or (path / INDEX).exists():
    return _open_file
  return _open_file if path.is_file() else None


def _what_is_there(path: pathlib.Path) -> str:
  if not path.exists():
    return "There is nothing of this name."
  if not path.is_dir():
    return "It is no regular file."
  names = sorted(entry.name for entry in path.iterdir())
  there = (
    f"The folder has {', '.join(names[:8])}{', …' if len(names) > 8 else ''}." if names else "The folder is empty."
  )
  torch = next((name for name in names if name.endswith((".bin", ".pth", ".pt"))), None)
  return there if torch is None else f"{there} Of a file like {torch}, give the path of the file itself."


def _open_run(path: pathlib.Path, overrides: dict[str, Any], sharding: Placement | None) -> tuple[Backbone, dict]:
  from vit_jax import config, methods  # heavy: a model file needs neither
  from vit_jax.config.students import config_at

  address = checkpoints.find(path)
  saved = config.from_dict(checkpoints.read_meta(address.workdir, step=address.step)["config"])
  try:
    model = methods.backbone(config_at(saved, address))
    if getattr(model, "quantization", None):  # for the speed of training; features are wanted in full
      overrides = {"quantization": None} | overrides
    model = model.clone(**overrides)
  except ValueError as error:
    raise UnknownModel(f"{path}: {error}.") from error
  tree = checkpoints.restore_params(address.workdir, (*address.place, "backbone"), address.step, sharding)
  return model, tree


def _open_own(path: pathlib.Path, overrides: dict[str, Any], sharding: Placement | None) -> tuple[Backbone, dict]:
  try:
    module, attributes = record.from_json(read_json(path / MODEL))
  except weights.WeightsError as error:
    raise weights.WeightsError(f"{path}: {error}") from error
  return module(**(attributes | overrides)), trees.read_tree(path / PARAMS, sharding)


def _open_file(path: pathlib.Path, overrides: dict[str, Any], sharding: Placement | None) -> tuple[Backbone, dict]:
  opened = open_weights(path)
  found = opened.backbone
  model = found.module(**(found.attributes | overrides))
  try:
    model.check()
  except ValueError as error:
    raise weights.WeightsError(f"{path}: {error}") from error
  if opened.inferred:
    _log.info("%s: inferred %s.", path, _describe(model))
    _say_what_was_assumed(path, {k: v for k, v in found.assumed.items() if k.partition(".")[0] not in overrides})
  if opened.others:
    _log.info("%s: taking the backbone; not loaded: %s.", path, ", ".join(opened.others))
  try:
    return model, weights.from_state_dict(opened.tensors["backbone"], model, found.layout, sharding=sharding)
  except weights.WeightMismatch as error:
    raise weights.WeightMismatch(f"{path}: {error}") from error


def _say_what_was_assumed(path: pathlib.Path, assumed: Mapping[str, Any]) -> None:
  if not assumed:
    return
  others = ", ".join(dict.fromkeys(f"{name.partition('.')[0]}=…" for name in assumed))
  values = ", ".join(f"{name}={value!r}" for name, value in assumed.items())
  _log.warning("%s: not in the file, assumed: %s. Others are given by load_model(path, %s).", path, values, others)


def _describe(model: Backbone) -> str:
  plain, fields = record.to_json(type(model)()), record.to_json(model)
  always = [name for name in ("patch_size", "width", "depth", "num_heads", "mlp") if name in plain]
  different = [name for name in fields if fields[name] != plain[name]]
  named = (f"{name}={getattr(model, name)!r}" for name in dict.fromkeys([*always, *different]))
  return f"{type(model).__name__}({', '.join(named)})"


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


def _write_safetensors(path: pathlib.Path, model: Backbone, params: Mapping[str, Any], export: _Export) -> None:
  if getattr(model, "separate_local_cls_norm", False):
    _log.info("Left out of %s: local_cls_norm, which only training uses.", export.target)
    model = model.clone(separate_local_cls_norm=False)
    params = {name: value for name, value in params.items() if name != "local_cls_norm"}
  if getattr(model, "rope", None) is not None and model.rope.dtype != "float32":
    _log.info("Rotary tables of %s become float32 in the export, as in the published models.", model.rope.dtype)
  family = family_of_model(model)
  if family.masking is not None:
    model, params = _with_masking(model, params, family.masking, export.target)
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
  state_dict = weights.lazy_state_dict(params, model, layout)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_pth(path, state_dict, _texts(model, layout, export))


def _write_timm(path: pathlib.Path, model: Backbone, params: Mapping[str, Any], export: _Export) -> None:
  model, params = _with_masking(model, params, False, export.target)
  state_dict = weights.lazy_state_dict(params, model, "timm")
  path.parent.mkdir(parents=True, exist_ok=True)
  write_safetensors(path, state_dict, _texts(model, "timm", export))


def _texts(model: Backbone, layout: str, export: _Export) -> dict[str, str]:
  """What a single file says besides its tensors, where others pass over it."""
  own = {MODEL: record.to_text(model, layout)}
  return own if export.preprocessor is None else own | {PREPROCESSOR: json.dumps(export.preprocessor)}


def _write_orbax(path: pathlib.Path, model: Backbone, params: Mapping[str, Any], export: _Export) -> None:
  path.mkdir(parents=True)
  _write_json(path / MODEL, {"module": type(model).__name__, "attributes": record.to_json(model)})
  trees.write_tree(path / PARAMS, params)
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
    if path.exists() and not overwrite and path.stat().st_size and not _is_own_file(path, format):
      raise UnknownModel(
        f"{path} is there and no export of vit_jax in format {format!r}: choose another name, or replace it "
        "with --overwrite (overwrite=True)."
      )
    return path
  if path.is_dir():
    _check_folder(path, format, overwrite)
  elif path.exists():
    raise UnknownModel(f"{path} is a file; this format writes a folder.")
  elif path.suffix in (".safetensors", ".pth"):
    raise UnknownModel(
      f"{path}: format {format!r} writes a folder: name it {path.stem}, or choose a format that is one file, "
      f"{' or '.join(_FILES)}."
    )
  return path


def _check_folder(path: pathlib.Path, format: str, overwrite: bool) -> None:
  known = (SINGLE, INDEX, SHARDS, CONFIG, PREPROCESSOR, MODEL, PARAMS)
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
