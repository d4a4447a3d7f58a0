"""Models of the Hugging Face Hub that its own tools have brought to this machine. Nothing here uses the network."""

from __future__ import annotations

import os
import pathlib
import re

from vit_jax.weights.errors import WeightsError

# ORG/NAME, as the Hub has them; what begins with a dot, a slash or a tilde is a path.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_GATED = "facebook/dinov3"  # models whose licence has to be accepted


def is_name(path: str | os.PathLike) -> bool:
  """Whether this may be the name of a model of the Hub: ORG/NAME, and neither it nor a folder ORG is here."""
  text = os.fspath(path)
  if not _NAME.fullmatch(text) or ".." in text or "--" in text:
    return False
  return not pathlib.Path(text).exists() and not pathlib.Path(text).parent.exists()


def find_model(name: str) -> pathlib.Path | None:
  """The folder of a model of this name: of the revision "main", or of the only one that is here; None: none is.

  Raises:
    WeightsError: if there are several revisions, of which none is "main", or its files are not complete.
  """
  for cache in caches():
    folder = cache / f"models--{name.replace('/', '--')}"
    main = folder / "refs" / "main"
    revisions = sorted(entry for entry in (folder / "snapshots").glob("*") if entry.is_dir())
    if main.is_file():
      revision = main.read_text(errors="replace").strip()
      chosen = next((entry for entry in revisions if entry.name == revision), None)
    else:
      chosen = revisions[0] if len(revisions) == 1 else None
    if chosen is None and revisions:
      raise WeightsError(
        f"{name}: {folder} has other revisions than main: give the path of one, such as {revisions[-1]}, or {how(name)}"
      )
    if chosen is not None:
      _check_complete(name, chosen)
      return chosen
  return None


def locate(path: str | os.PathLike) -> pathlib.Path:
  """The path itself, or the folder of the model of the Hub that it names.

  Raises:
    WeightsError: if it names a model that is not on this machine, or not complete; says how it comes here.
  """
  here = pathlib.Path(path).expanduser()
  if not is_name(path):
    return here
  name = os.fspath(path)
  found = find_model(name)
  if found is None:
    raise WeightsError(
      f"{name} is neither a path here (a run, a file of weights, a folder of a model) nor a model in {caches()[0]}. If "
      f"it is one of huggingface.co: {how(name)}"
    )
  return found


def how(name: str) -> str:
  """The command that brings a model to this machine, and what has to be done before."""
  page = f"https://huggingface.co/{name}"
  first = f"accept its licence on {page} and log in (hf auth login), then " if name.startswith(_GATED) else ""
  return f"{first}bring it to this machine with: hf download {name}"


def caches() -> list[pathlib.Path]:
  """Where huggingface_hub keeps what it has brought, by its environment variables."""
  given = [os.environ.get(key) for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")]
  home = os.environ.get("HF_HOME")
  root = os.environ.get("XDG_CACHE_HOME", "~/.cache")
  places = [*given, f"{home}/hub" if home else f"{root}/huggingface/hub"]
  return list(dict.fromkeys(pathlib.Path(place).expanduser() for place in places if place))


def _check_complete(name: str, folder: pathlib.Path) -> None:
  """Files are links to blobs, which an interrupted download has not brought yet."""
  lost = sorted(entry.name for entry in folder.iterdir() if not entry.exists())
  weights = any(entry.suffix in _WEIGHTS for entry in folder.iterdir())
  if lost or not weights:
    what = f"lacks {', '.join(lost[:3])}" if lost else "has no weights"
    raise WeightsError(f"{name}: {folder} {what}, as after an interrupted download; {how(name)}")
