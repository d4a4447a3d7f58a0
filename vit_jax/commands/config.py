"""`vit-jax config …`: the run files that come with vit_jax: list them, show one, copy one to change it."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from vit_jax.commands.common import line_width
from vit_jax.commands.flags import Commands, add
from vit_jax.config.errors import UserError


def add_to(commands: Commands) -> None:
  """Their flags."""
  config = add(commands, "config", None, "list the run files that come with vit_jax; show or copy one")
  actions = config.add_subparsers(title="what", required=True, metavar="WHAT")
  add(actions, "list", _list, "the names for --config, what each is for, on which hardware, how long")
  show = add(actions, "show", _show, "print a run file")
  show.add_argument("name", metavar="NAME", help="as `vit-jax config list` shows it")
  copy = add(actions, "copy", _copy, "write a run file into the current folder, to change it")
  copy.add_argument("name", metavar="NAME", help="as `vit-jax config list` shows it")


def _list(args: argparse.Namespace) -> None:
  from vit_jax.config import shipped

  print("Use a name as it is, anywhere: vit-jax train --config=NAME --workdir=FOLDER")
  width = line_width() or 10_000
  for name in shipped.names():
    header = shipped.header(shipped.path_of(name))
    lines = [header.title]
    if header.variants:
      lines.append(f"Variants: {', '.join(f'{name}:{variant}' for variant in header.variants)}.")
    lines.append(f"Hardware: {header.hardware}. Wall time: {header.wall_time}.")
    print(f"\n{name}")
    for line in lines:
      print(textwrap.fill(line, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))


def _show(args: argparse.Namespace) -> None:
  print(_path(args.name).read_text(encoding="utf-8"), end="")


def _copy(args: argparse.Namespace) -> None:
  path = _path(args.name)
  target = Path(path.name)
  try:
    with target.open("x", encoding="utf-8") as file:
      file.write(path.read_text(encoding="utf-8"))
  except FileExistsError:
    raise UserError(f"{target}: is there already; move it away first, or go to another folder") from None
  except OSError as error:
    raise UserError(f"{target}: cannot be written: {error.strerror}") from error
  print(f"wrote {target}; use it as --config={target}")


def _path(name: str) -> Path:
  from vit_jax.config import shipped

  return shipped.path_of(name.removesuffix(".py"))
