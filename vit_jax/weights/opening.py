"""What weights of others hold, whatever wrote them: the tensors of each sub-module, and the backbone's architecture."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vit_jax.weights import bounds, timm_config, wrapped
from vit_jax.weights.distributed import METADATA, open_distributed
from vit_jax.weights.errors import WeightsError, about, reading
from vit_jax.weights.families import family_of_config
from vit_jax.weights.files import INDEX, SINGLE, open_safetensors, open_shards, read_metadata
from vit_jax.weights.grids import Given, ImageSize, with_grid
from vit_jax.weights.infer import Recognised, recognise
from vit_jax.weights.preprocessor import Preprocessor, from_preprocessor, is_legacy
from vit_jax.weights.pth import is_torch, open_pth, read_extra
from vit_jax.weights.record import MODEL, read_text
from vit_jax.weights.texts import parse_json, read_json

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"  # of a Hugging Face folder
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
HEADS = ("dino_head", "ibot_head")
# Of the published satellite models, whose files say it by their names.
SATELLITE = ("sat493m", Preprocessor((0.430, 0.411, 0.296), (0.213, 0.156, 0.143), 224))

_MOST_NAMED = 20
_LARGEST_IMAGE = 1 << 16  # pixels of a side

_log = logging.getLogger(__name__)


class Opened(NamedTuple):
  """Weights of others.

  Attributes:
    backbone: its layout and architecture.
    tensors: by sub-module, not read yet: "backbone", and of a training export "dino_head" and "ibot_head" (layout
      "dinov3").
    normalization: mean and standard deviation of the images it was trained with; None: the file does not say.
    inferred: whether the architecture was read off the tensors, for want of a configuration.
  """

  backbone: Recognised
  tensors: dict[str, Mapping[str, Any]]
  normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
  inferred: bool = False


def open_weights(path: pathlib.Path, *, given: Given = None) -> Opened:
  """Opens a file of torch, a safetensors file, or a folder of Hugging Face or of torch.distributed.checkpoint.

  The log says what was taken of it where it holds more than a backbone, and what was taken off the names.

  Args:
    path: where it is; `FILE#teacher.backbone` says which backbone of several.
    given: the table of learned positions, its grid, or the size of the images that it is for, where the file does not
      say it (or says another).

  Raises:
    WeightsError: if it cannot be read, claims more than its bytes are worth, or holds no backbone that is known.
    FileNotFoundError: if there is nothing.
  """
  path, wanted = split_address(path)
  if path.is_dir() and _reader(path) is None:
    raise WeightsError(
      f"{path} is no model: a folder of weights has {SINGLE} or {TORCH_SINGLE} (or their sharded forms) and {CONFIG}, "
      f"or the {METADATA} of torch.distributed.checkpoint."
    )
  content = open_tensors(path)
  config, own = _configuration(path), _text(path, MODEL)
  described = None if config is None or own is not None else _described(config, path)
  stored = read_preprocessor(path)
  with reading(path), about(path):
    part = wrapped.find(content, HEADS, wanted)
    total = sum(tensor.nbytes for tensors in (part.tensors, *part.siblings.values()) for tensor in tensors.values())
    bounds.check_bytes(total, _stored(path), "its backbone")
    if own is None and described is None:
      backbone = _recognised(part, given, timm_config.image_size(_beside(path)))
      if backbone.layout == "timm":
        timm_config.check_architecture(_beside(path), rotary=backbone.attributes["rope"] is not None)
    else:
      backbone = _with_given(described or read_text(own, part.tensors), given)
    bounds.check_attributes(backbone.module, backbone.attributes)
    bounds.check_architecture(backbone.module(**backbone.attributes), part.tensors)
  _say_what_was_taken(path, part)
  inferred, normalization = own is None and described is None, None if stored is None else stored[:2]
  return Opened(backbone, {"backbone": part.tensors} | part.siblings, normalization, inferred)


def open_tensors(path: pathlib.Path) -> Mapping[str, Any]:
  """What a file or a folder of others holds: tensors by name, or nested dicts of them; none is read yet.

  Raises:
    as `open_weights`.
  """
  reader = _reader(path)
  if reader is None:
    raise FileNotFoundError(f"there is no file {path}.")
  return reader(path)


def holds_weights(path: pathlib.Path) -> bool:
  """Whether there is a file, or a folder of a kind that `open_weights` opens."""
  return _reader(split_address(path)[0]) is not None


def newest_step(path: pathlib.Path) -> pathlib.Path | None:
  """The last step of a training with torch.distributed.checkpoint below a folder, by number; None: there is none."""
  steps = [step.parent for pattern in ("*", "*/*") for step in path.glob(f"{pattern}/{METADATA}")]
  return max(steps, key=lambda step: int(step.name) if step.name.isdecimal() else -1, default=None)


def split_address(path: pathlib.Path) -> tuple[pathlib.Path, str | None]:
  """The path of an address, and what follows its last "#": which part is meant."""
  text, sign, part = str(path).rpartition("#")
  if not sign or path.exists() or not pathlib.Path(text).exists():
    return path, None
  return pathlib.Path(text), part


def _reader(path: pathlib.Path) -> Callable[[pathlib.Path], Mapping[str, Any]] | None:
  """What opens a file or a folder, by what is in it; None: there is nothing to open."""
  if path.is_file() and (path.name == METADATA or path.suffix == ".distcp"):
    return _refuse_piece
  if path.is_file():
    return open_safetensors if _is_safetensors(path) else open_pth
  for names, reader in _FOLDERS:
    if any((path / name).exists() for name in names):
      return reader
  return None


def _refuse_piece(path: pathlib.Path) -> Mapping[str, Any]:
  raise WeightsError(
    f"{path} is a piece of a checkpoint of torch.distributed.checkpoint: give its folder, {path.parent}."
  )


def _open_torch_folder(path: pathlib.Path) -> Mapping[str, Any]:
  if (path / TORCH_SINGLE).exists():
    return open_pth(path / TORCH_SINGLE)
  return open_shards(path / TORCH_INDEX, open_pth, strict=False)


_FOLDERS = (
  ((SINGLE, INDEX), open_safetensors),
  ((TORCH_SINGLE, TORCH_INDEX), _open_torch_folder),
  ((METADATA,), open_distributed),
)


def read_preprocessor(path: pathlib.Path) -> Preprocessor | None:
  """What is said of the images of the model at `path`; None: nothing.

  It is in a folder, beside a file, or in the texts that a file has room for; of timm, in its config.json.

  Raises:
    WeightsError: if what is said makes no sense.
  """
  path, _ = split_address(path)
  with reading(path), about(path):
    if (stored := _stored_preprocessor(path)) is not None:
      values, ours = stored
      found = from_preprocessor(values, ours=ours)
    else:
      found = SATELLITE[1] if SATELLITE[0] in path.name else timm_config.preprocessor(_beside(path))
    if found is not None:
      _check_preprocessor(found)
    return found


def _check_preprocessor(said: Preprocessor) -> None:
  numbers = (*said.mean, *said.std, *(said.value_range or ()))
  if not all(type(n) in (int, float) and abs(n) < 1e9 for n in numbers) or not min(said.std, default=0) > 0:
    raise WeightsError(f"image_mean={said.mean} with image_std={said.std}: must be numbers, image_std above 0.")
  sizes = [said.image_size]
  for size in () if said.frame is None else (said.frame.resize, said.frame.crop):
    sizes += [] if size is None else [size] if isinstance(size, int) else size
  if not all(type(side) is int and 1 <= side <= _LARGEST_IMAGE for side in sizes):
    raise WeightsError(f"its images have sizes of {sizes}: must be numbers of pixels up to {_LARGEST_IMAGE}.")


def stored_preprocessor(path: pathlib.Path) -> dict[str, Any] | None:
  """The preprocessor_config.json of the model at `path`, as it is; None: there is none that says what was evaluated."""
  stored = _stored_preprocessor(split_address(path)[0])
  return None if stored is None or is_legacy(*stored) else stored[0]


def _stored_preprocessor(path: pathlib.Path) -> tuple[dict[str, Any], bool] | None:
  """The preprocessor_config.json of the model at `path`, and whether it is in what only vit_jax writes."""
  text, beside = _text(path, PREPROCESSOR), (path if path.is_dir() else path.parent) / PREPROCESSOR
  if text is not None:
    values, ours = parse_json(text, f"its {PREPROCESSOR}"), True
  elif path.suffix != ".pth" and beside.exists():
    values, ours = read_json(beside), (path / MODEL).exists()
  else:
    return None
  if not isinstance(values, dict):
    raise WeightsError(f"{beside}: is no JSON object.")
  return values, ours


def _text(path: pathlib.Path, name: str) -> str | None:
  """A text in a single file of weights, which may be that of a folder; None: there is none."""
  file = path / SINGLE if path.is_dir() else path
  if not file.is_file():
    return None
  return read_metadata(file).get(name) if _is_safetensors(file) else read_extra(file, name)


def _is_safetensors(file: pathlib.Path) -> bool:
  """Whether a file is to be read as one of safetensors: torch's are known by their content, whatever their names."""
  if is_torch(file):
    return False
  with reading(file), file.open("rb") as content:
    return file.suffix == ".safetensors" or content.read(9)[8:] == b"{"


def _beside(path: pathlib.Path) -> dict[str, Any]:
  """The config.json that goes with the weights: transformers' or timm's; empty: there is none."""
  beside = (path if path.is_dir() else path.parent) / CONFIG
  goes_with = path.is_dir() or path.suffix == ".safetensors" or path.name == TORCH_SINGLE
  config = read_json(beside) if goes_with and beside.exists() else {}
  if not isinstance(config, dict):
    raise WeightsError(f"{beside} is no configuration of a model.")
  return config


def _configuration(path: pathlib.Path) -> dict[str, Any] | None:
  """The config.json of transformers that goes with the weights; timm's has other keys."""
  config = _beside(path)
  return config if "model_type" in config else None


def _with_given(found: Recognised, given: Given) -> Recognised:
  """A backbone of a file that says its attributes, with the grid that is given for its table of positions."""
  table = with_grid(found.attributes.get("position_table"), given, found.attributes.get("patch_size", 1))
  if table is None:
    return found
  said = found.attributes["position_table"].grid
  if table.grid != said:
    _log.warning("The file says a grid of %s x %s positions; given, and taken, is %s x %s.", *said, *table.grid)
  return found._replace(attributes=found.attributes | {"position_table": table})


def _described(config: Mapping[str, Any], path: pathlib.Path) -> Recognised:
  """The backbone that a config.json describes."""
  where = (path if path.is_dir() else path.parent) / CONFIG
  with reading(where), about(where):
    family = family_of_config(config)
    attributes = family.to_attributes(config)
    bounds.check_attributes(family.module, attributes)
    return Recognised(family.layout, family.module, attributes, {})


def _recognised(part: wrapped.Part, given: Given, said: ImageSize | None) -> Recognised:
  """The backbone of a layout that tells its architecture."""
  if not part.tensors and part.others:
    raise WeightsError(
      f"it holds no tensors, but {_listed(part.others)}: of an object that you trust, save its state_dict() with torch."
    )
  if any(name.startswith("embeddings.") for name in part.tensors):
    raise WeightsError(
      f"its tensors have the names of a Hugging Face model, of which {CONFIG} says the architecture: put it beside."
    )
  return recognise(part.tensors, given=given, said=said)


def _stored(path: pathlib.Path) -> int:
  """The bytes of a file, or of the files of a folder."""
  return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()) if file.is_file())


def _say_what_was_taken(path: pathlib.Path, part: wrapped.Part) -> None:
  said = [f"{part.prefix!r} taken off the names"] if part.prefix else []
  said += part.renamed
  if said:
    _log.info("%s: taking the backbone (%s).", path, "; ".join(said))
  if part.others:
    _log.info("%s: not loaded: %s.", path, _listed(part.others))


def _listed(names: tuple[str, ...]) -> str:
  return ", ".join(names[:_MOST_NAMED]) + (f", … ({len(names)} in all)" if len(names) > _MOST_NAMED else "")
