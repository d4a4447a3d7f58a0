"""What a weight file holds, whatever wrote it: the tensors of each sub-module, and the architecture of the backbone."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from vit_jax.weights import timm_config
from vit_jax.weights.convert import select
from vit_jax.weights.errors import WeightsError
from vit_jax.weights.families import family_of_config
from vit_jax.weights.files import INDEX, SINGLE, check_no_pointer, open_safetensors, read_metadata
from vit_jax.weights.grids import Given, ImageSize, with_grid
from vit_jax.weights.infer import Recognised, recognise
from vit_jax.weights.preprocessor import Preprocessor, from_preprocessor, is_legacy
from vit_jax.weights.pth import open_pth, read_extra
from vit_jax.weights.record import MODEL, read_text

_log = logging.getLogger(__name__)

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"  # of a Hugging Face folder
HEADS = ("dino_head", "ibot_head")
# Of the published satellite models, whose files say it by their names.
SATELLITE = ("sat493m", Preprocessor((0.430, 0.411, 0.296), (0.213, 0.156, 0.143), 224))


class Opened(NamedTuple):
  """A weight file.

  Attributes:
    backbone: its layout and architecture.
    tensors: by sub-module, not read yet: "backbone", and of a training export "dino_head" and "ibot_head" (layout
      "dinov3").
    normalization: mean and standard deviation of the images it was trained with; None: the file does not say.
    inferred: whether the architecture was read off the tensors, for want of a configuration.
    others: beginnings of the names of tensors besides the backbone's.
  """

  backbone: Recognised
  tensors: dict[str, Mapping[str, Any]]
  normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
  inferred: bool = False
  others: tuple[str, ...] = ()


def open_weights(path: pathlib.Path, *, given: Given = None) -> Opened:
  """Opens a `.pth` file, a safetensors file, or a Hugging Face folder.

  Args:
    path: the file or folder.
    given: the table of learned positions, its grid, or the size of the images that it is for, where the file does not
      say it (or says another).

  Raises:
    WeightsError: if it cannot be read, or holds no backbone that is known.
    FileNotFoundError: if there is nothing.
  """
  if path.is_dir() and not any((path / name).exists() for name in (SINGLE, INDEX)):
    raise WeightsError(f"{path} is no model: a folder of weights has {SINGLE} (or its sharded form) and {CONFIG}.")
  config = _configuration(path)
  tensors = open_safetensors(path) if _is_safetensors(path) else open_pth(path)
  stored, own = read_preprocessor(path), _text(path, MODEL)
  normalization = None if stored is None else stored[:2]
  if config is not None and own is None:
    return _from_config(config, tensors, path, given)._replace(normalization=normalization)
  try:
    if own is None:
      opened = _from_names(tensors, given, timm_config.image_size(_beside(path)))
    else:
      opened = _with_given(Opened(read_text(own, tensors), {"backbone": tensors}), given)
    return opened._replace(normalization=normalization)
  except WeightsError as error:
    raise WeightsError(f"{path}: {error}") from error


def read_preprocessor(path: pathlib.Path) -> Preprocessor | None:
  """What is said of the images of the model at `path`; None: nothing.

  It is in a folder, beside a file, or in the texts that a file has room for; of timm, in its config.json.
  """
  if (stored := _stored_preprocessor(path)) is not None:
    values, ours = stored
    return from_preprocessor(values, ours=ours)
  if SATELLITE[0] in path.name:
    return SATELLITE[1]
  return timm_config.preprocessor(_beside(path))


def stored_preprocessor(path: pathlib.Path) -> dict[str, Any] | None:
  """The preprocessor_config.json of the model at `path`, as it is; None: there is none that says what was evaluated."""
  stored = _stored_preprocessor(path)
  return None if stored is None or is_legacy(*stored) else stored[0]


def _stored_preprocessor(path: pathlib.Path) -> tuple[dict[str, Any], bool] | None:
  """The preprocessor_config.json of the model at `path`, and whether it is in what only vit_jax writes."""
  text, beside = _text(path, PREPROCESSOR), (path if path.is_dir() else path.parent) / PREPROCESSOR
  if text is not None:
    values, ours = json.loads(text), True
  elif path.suffix != ".pth" and beside.exists():
    values, ours = read_json(beside), (path / MODEL).exists()
  else:
    return None
  if not isinstance(values, dict):
    raise WeightsError(f"{beside}: is no JSON object.")
  return values, ours


def read_json(path: pathlib.Path) -> Any:
  """The content of a JSON file.

  Raises:
    WeightsError: if it is none.
  """
  check_no_pointer(path)
  try:
    return json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise WeightsError(f"{path} is no JSON: {error}.") from error


def _text(path: pathlib.Path, name: str) -> str | None:
  """A text in a single file of weights, which may be that of a folder; None: there is none."""
  file = path / SINGLE if path.is_dir() else path
  if not file.is_file():
    return None
  return read_metadata(file).get(name) if _is_safetensors(file) else read_extra(file, name)


def _is_safetensors(path: pathlib.Path) -> bool:
  return path.is_dir() or path.suffix == ".safetensors"


def _beside(path: pathlib.Path) -> dict[str, Any]:
  """The config.json that goes with the weights: transformers' or timm's; empty: there is none."""
  beside = (path if path.is_dir() else path.parent) / CONFIG
  config = read_json(beside) if _is_safetensors(path) and beside.exists() else {}
  return config if isinstance(config, dict) else {}


def _configuration(path: pathlib.Path) -> dict[str, Any] | None:
  """The config.json of transformers that goes with the weights; timm's has other keys."""
  config = _beside(path)
  return config if "model_type" in config else None


def _with_given(opened: Opened, given: Given) -> Opened:
  """A file that says its attributes, with the grid that is given for its table of positions."""
  attributes = opened.backbone.attributes
  table = with_grid(attributes.get("position_table"), given, attributes.get("patch_size", 1))
  if table is None:
    return opened
  said = attributes["position_table"].grid
  if table.grid != said:
    _log.warning("The file says a grid of %s x %s positions; given, and taken, is %s x %s.", *said, *table.grid)
  return opened._replace(backbone=opened.backbone._replace(attributes=attributes | {"position_table": table}))


def _from_config(config: Mapping[str, Any], tensors: Mapping[str, Any], path: pathlib.Path, given: Given) -> Opened:
  """A backbone that a config.json describes, alone or in a model with a task's head."""
  try:
    family = family_of_config(config)
    recognised = Recognised(family.layout, family.module, family.to_attributes(config), {})
    recognised = _with_given(Opened(recognised, {}), given).backbone
  except WeightsError as error:
    raise WeightsError(f"{(path if path.is_dir() else path.parent) / CONFIG}: {error}") from error
  prefix = f"{config['model_type']}."
  if not any(name.startswith(prefix) for name in tensors):
    return Opened(recognised, {"backbone": tensors})
  return Opened(recognised, {"backbone": select(tensors, prefix)}, others=_besides(tensors, prefix))


def _from_names(tensors: Mapping[str, Any], given: Given, said: ImageSize | None) -> Opened:
  """A backbone in a layout that tells its architecture: flat, or in a training export next to its heads."""
  if "teacher" in tensors:
    tensors = select(tensors, "teacher")
  if not any(name.startswith("backbone.") for name in tensors):
    return Opened(recognise(tensors, given=given, said=said), {"backbone": tensors}, inferred=True)
  heads = [head for head in HEADS if any(name.startswith(f"{head}.") for name in tensors)]
  parts = {name: select(tensors, f"{name}.") for name in ("backbone", *heads)}
  return Opened(
    recognise(parts["backbone"], given=given, said=said), parts, inferred=True, others=_besides(tensors, "backbone.")
  )


def _besides(tensors: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
  return tuple(sorted({name.split(".")[0] for name in tensors if not name.startswith(prefix)}))
