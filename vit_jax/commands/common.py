"""What several sub-commands do: read their config, try where they will write, show a text, describe a model."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vit_jax.commands.flags import PICTURES
from vit_jax.config.errors import UserError

if TYPE_CHECKING:
  from ml_collections import ConfigDict

  from vit_jax.data.limits import Limits

_NO_TEXTS = (*PICTURES, ".py", ".json", ".jsonl", ".safetensors", ".pth", ".pt", ".bin", ".npy", ".npz", ".tar", ".zip",
             ".parquet", ".array_record")  # fmt: skip
# Files of runs and of exported models, whose endings those of results are.
_OF_MODELS = {"config.json", "model.json", "preprocessor_config.json", "model.safetensors.index.json", "classes.json",
              "metrics.jsonl", "goodput.json", "bad_records.jsonl"}  # fmt: skip


def load(args: argparse.Namespace) -> ConfigDict:
  """The validated config of a command line."""
  from vit_jax import config

  loaded = config.load(args.config, args.overrides)
  config.validate(loaded)
  return loaded


def limits(args: argparse.Namespace) -> Limits:
  """The bounds on images of a command with the flags of `with_limits`."""
  from vit_jax.data.limits import DEFAULT, Limits

  return Limits(args.max_pixels or DEFAULT.max_pixels, args.max_file_bytes or DEFAULT.max_file_bytes)


def line_width(output: str | None = None) -> int | None:
  """Characters of a line where a text is shown: of the terminal; None: it goes to a file or into a pipe."""
  from vit_jax.inspect.columns import terminal_width

  return None if output is not None else terminal_width()


def model_table(config: ConfigDict, *, width: int | None = None) -> str:
  """Parameters, tokens and FLOPs of what a config trains; `width` as in `inspect.columns.align`."""
  from vit_jax import methods
  from vit_jax.config import loss_group_size
  from vit_jax.data.views.multi_crop.masks import masked_patches
  from vit_jax.inspect import tables
  from vit_jax.methods.dino import gram

  method = methods.get(config.method)
  views, group = method.views(config), loss_group_size(config)
  masked = [masked_patches(group, v.mask_grid, v.mask_probability, v.mask_ratio) / group for v in views.variants()]
  frozen, parts = methods.frozen_teacher(config), []
  for name, alone in methods.each_student(config).items():
    anchored = gram.has_own_pass(alone, distilling=frozen is not None)
    table = tables.training_table(
      method.modules(alone), views, masked=masked, own_teacher=frozen is None, gram_teacher=anchored, width=width
    )
    parts.append(f"student {name}\n\n{table}" if name else table)
  if frozen is not None:
    sizes = [("global crop", v.mask_grid[0] * frozen.modules.backbone.stride) for v in views.variants()]
    heads = {"dino_head": frozen.modules.dino_head, "ibot_head": frozen.modules.ibot_head}
    table = tables.model_table(frozen.modules.backbone, image_sizes=sizes, heads=heads, width=width)
    parts.append(f"frozen teacher {frozen.address}\n\n{table}")
  return "\n\n".join(parts)


def show(text: str, output: Path | None, flag: str = "--output") -> None:
  """Prints a text, or writes it to the `destination` that a flag named; where that fails after all, prints it."""
  if output is None:
    print(text)
    return
  try:
    with writing(output, flag):
      output.write_text(text + "\n", encoding="utf-8")
  except UserError:
    print(text)
    raise
  print(f"wrote {output}")


def destination(
  path: str | None, flag: str, *, folder: bool = False, text: bool = False, endings: Sequence[str] = ()
) -> Path | None:
  """Where a command is to write, tried before its work: no result shall be lost because its place cannot be written.

  Nothing is left there by trying. Devices and pipes are taken as they are.

  Args:
    path: what the user gave; None: nothing, which is what is returned.
    flag: with which.
    folder: whether a folder is written, not a file.
    text: whether a text is written: it may have any ending, but takes the place of none that is no text.
    endings: one of which a file must have; none given: any.

  Raises:
    UserError: one line that says what is in the way.
  """
  if path is None:
    return None
  wrong = f"{flag}={path}: "
  if not path:
    raise UserError(f"{wrong}names no {'folder' if folder else 'file'}")
  try:
    place = Path(path).expanduser()
    there = place.stat()
  except FileNotFoundError:  # to be made; a link to nothing counts by what it points to
    there, place = None, Path(os.path.realpath(place)) if place.is_symlink() else place
  except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody
    raise UserError(f"{wrong}cannot be written: {_reason(error)}") from error
  _check_kind(place, there, path, wrong, folder=folder, endings=endings)
  if there is None:
    _try_new(place, wrong)
  elif folder:
    _try_in(place, wrong)
  elif stat.S_ISREG(there.st_mode):
    if place.name in _OF_MODELS or (text and place.suffix.lower() in _NO_TEXTS):
      raise UserError(f"{wrong}is there already, and nothing that this command writes: choose another name")
    try:
      os.close(os.open(place, os.O_WRONLY | os.O_APPEND))
    except OSError as error:
      raise UserError(f"{wrong}cannot be written: {_reason(error)}") from error
  return place


@contextlib.contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
  """Around the writing of a file to a `destination`: its folder is made; what goes wrong is said in a line."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield
  except OSError as error:
    raise UserError(f"{flag}={path}: cannot be written: {_reason(error)}") from error


def _check_kind(
  place: Path, there: os.stat_result | None, path: str, wrong: str, *, folder: bool, endings: Sequence[str]
) -> None:
  """Refuses a folder for a file, a file for a folder, and another ending; a device has none."""
  is_folder = there is not None and stat.S_ISDIR(there.st_mode)
  if folder:
    if there is not None and not is_folder:
      raise UserError(f"{wrong}is a file; give a folder to write into")
    return
  if is_folder or path.endswith(os.sep):
    name = f"result{endings[0] if endings else '.txt'}"
    raise UserError(f"{wrong}is a folder; name a file in it, such as {place / name}")
  named = not path.startswith("/dev/") and (there is None or stat.S_ISREG(there.st_mode))  # /dev/stdout may be a file
  if endings and named and place.suffix.lower() not in endings:
    raise UserError(f"{wrong}must end in {' or '.join(endings)}")


def _try_new(place: Path, wrong: str) -> None:
  """Tries what making a new file or folder, with the folders above it, needs."""
  above = next(parent for parent in place.absolute().parents if os.path.lexists(parent))
  _try_in(above, wrong)
  longest = os.pathconf(above, "PC_NAME_MAX")
  for part in place.absolute().relative_to(above).parts:
    if len(os.fsencode(part)) > longest:
      raise UserError(f"{wrong}cannot be written: a name has {len(os.fsencode(part))} bytes, more than {longest}")


def _try_in(folder: Path, wrong: str) -> None:
  """Makes a file in a folder that is there, and takes it away again."""
  try:
    if not folder.is_dir():
      raise UserError(f"{wrong}cannot be written: {folder} is no folder")
    with tempfile.TemporaryFile(dir=folder) as file:
      file.write(bytes(4096))  # a full disk shows, too
  except OSError as error:
    raise UserError(f"{wrong}cannot be written: {folder}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
  return getattr(error, "strerror", None) or str(error)
