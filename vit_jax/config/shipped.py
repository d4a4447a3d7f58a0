"""The run files that come with vit_jax, by name: "dinov3_vits16", "dinov3/vitl16_im1k".

They are the files of the folder `configs` at the top of the repository; where vit_jax is installed, they lie inside it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

from vit_jax.config.errors import ConfigError
from vit_jax.config.fields import did_you_mean


class Header(NamedTuple):
  """What the first lines of a run file say of it."""

  title: str
  variants: tuple[str, ...]  # arguments that it takes
  hardware: str
  wall_time: str


def folder() -> Path:
  """Where the run files are."""
  package = Path(__file__).parents[1]
  installed = package / "configs"
  return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
  """The names of all run files, those of sub-folders last."""
  found = [path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.py")]
  return sorted(found, key=lambda name: (name.count("/"), name))


def path_of(name: str) -> Path:
  """The run file of a name, or of its last part where only one name ends so.

  Raises:
    ConfigError: if there is none, with the nearest; if there are several, with all of them.
  """
  path = find(name)
  if path is None:
    raise ConfigError(f"{name}: vit_jax has no run file of this name{nearest(name)}; see `vit-jax config list`")
  return path


def find(name: str) -> Path | None:
  """As `path_of`, but None if there is none."""
  known = names()
  matching = [name] if name in known else [one for one in known if one.rpartition("/")[2] == name]
  if len(matching) > 1:
    raise ConfigError(f"{name}: may mean {' or '.join(matching)}")
  return folder() / f"{matching[0]}.py" if matching else None


def nearest(name: str) -> str:
  """Brackets that ask for the nearest names, to append to a message; nothing if none is near."""
  known = names()
  begun = [one for one in known if name and (one.startswith(name) or one.rpartition("/")[2].startswith(name))]
  if begun:
    return f" (did you mean {' or '.join(map(repr, begun[:3]))}?)"
  return did_you_mean(name, known) or did_you_mean(name, [one.rpartition("/")[2] for one in known])


def header(path: Path) -> Header:
  """What a run file says of itself; what it does not say is empty."""
  text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
  title, _, rest = text.partition("\n")
  fields = re.split(r"\b(Variants|Hardware|Memory|Wall time|Expected|Planned):? ", " ".join(rest.split()))
  said = dict(zip(fields[1::2], (field.strip().rstrip(".") for field in fields[2::2]), strict=True))
  variants = tuple(dict.fromkeys(re.findall(r"`:(\w+)`", said.get("Variants", ""))))
  return Header(title, variants, said.get("Hardware", ""), said.get("Wall time", ""))
