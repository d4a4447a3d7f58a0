"""`folder:/path`: every image below a folder, at any depth."""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")


class FolderSource:
  """The images below a folder, in sorted order; the class of an image is its first sub-folder, if it has one.

  Files are read when they are asked for: one that is damaged or has vanished is met then.
  """

  def __init__(self, root: Path, files: list[str]):
    self._root = str(root)
    self._files = files  # relative to the root, "/" between the parts
    self.class_names = tuple(sorted({file.partition("/")[0] for file in files if "/" in file}))
    self.num_classes = len(self.class_names)
    self._class_of = {name: label for label, name in enumerate(self.class_names)}

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> dict[str, bytes | int]:
    file = self._files[index]
    with open(os.path.join(self._root, file), "rb") as handle:
      data = handle.read()
    return {"image": data, "label": self._class_of.get(file.partition("/")[0], -1) if "/" in file else -1}

  def describe(self, index: int) -> str:
    return os.path.join(self._root, self._files[index])


def open_folder(path: str, spec: str) -> FolderSource:
  """Lists the images below `path`.

  Hidden files and folders are left out; links are followed, except into a folder that contains the link.

  Raises:
    ValueError: if there is no such folder, or no image in it; it says what was found instead.
  """
  root = Path(path).expanduser()
  if not root.exists():
    parent = next(parent for parent in (root.absolute(), *root.absolute().parents) if parent.exists())
    raise ValueError(f"data.source = {spec!r}: there is no {root}; {_contents(parent)}.")
  if not root.is_dir():
    raise ValueError(f"data.source = {spec!r}: {root} is a file; give the folder that holds the images.")
  others: collections.Counter[str] = collections.Counter()
  files = []
  for file in _walk(str(root), "", ()):
    extension = os.path.splitext(file)[1].lower()
    if extension in EXTENSIONS:
      files.append(file)
    else:
      others[extension or "no extension"] += 1
  if not files:
    found = ", ".join(f"{count} x {extension}" for extension, count in others.most_common(8))
    found = f"only other files ({found})" if others else "no files at all"
    raise ValueError(f"data.source = {spec!r}: {root} holds {found}; images are {', '.join(EXTENSIONS)}.")
  source = FolderSource(root, files)
  if "train" in source.class_names and {"val", "validation", "test"} & set(source.class_names):
    log.warning("%s holds splits, which now count as classes: did you mean folder:%s/train?", root, root)
  return source


def _walk(folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str]:
  """Files below `folder`, sorted, as paths relative to where the walk began."""
  try:
    status = os.stat(folder)
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
  except OSError as error:
    log.warning("left out %s: %s", folder, error)
    return
  identity = (status.st_dev, status.st_ino)
  if identity in ancestors:
    log.warning("left out %s: it links back to a folder that contains it", folder)
    return
  for entry in entries:
    if entry.name.startswith("."):
      continue
    if entry.is_dir():
      yield from _walk(entry.path, f"{prefix}{entry.name}/", (*ancestors, identity))
    else:
      yield prefix + entry.name


def _contents(folder: Path) -> str:
  names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in os.scandir(folder))
  shown = ", ".join(names[:8]) + (f", … ({len(names)} entries)" if len(names) > 8 else "")
  return f"{folder} holds {shown}" if names else f"{folder} is empty"
