"""`folder:/path`: every image below a folder, at any depth, on a disk or in an object store.

The list of a large folder is kept as an index (`index.py`), so that ten million images are open in seconds. The times
at which the folders were last changed say whether it still holds: to add, remove or rename a file changes its folder's.
An object store has no such times; its index holds until `vit-jax data scan` makes it again.
"""

from __future__ import annotations

import array
import collections
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data import storage
from vit_jax.data.formats import EXTENSIONS
from vit_jax.data.index import Names, index_path, read_index, write_index
from vit_jax.data.limits import DEFAULT

log = logging.getLogger(__name__)

_INDEXED = 10_000  # images from which on an index is written without being asked for
_SUFFIX = ".vit_jax_index"  # of an index beside its folder
_RACE = 1_000_000_000  # ns: a folder changed this shortly before it was listed may change again unseen


class FolderSource:
  """The images below a folder, in sorted order; the class of an image is its first sub-folder, if it has one.

  Files are read when they are asked for: one that is damaged or has vanished is met then.
  """

  def __init__(
    self, root: str, names: Names, labels: np.ndarray, class_names: tuple[str, ...], index: Path | None = None
  ):
    self._root = root
    self._names = names  # relative to the root, "/" between the parts
    self._labels = labels  # int32 [N]
    self._index = index
    self.class_names = class_names
    self.num_classes = len(class_names)
    self.remote = storage.is_remote(root)
    self.limits = DEFAULT

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> dict[str, bytes | int]:
    return {"image": storage.read(self.describe(index), self.limits), "label": int(self._labels[index])}

  def describe(self, index: int) -> str:
    return os.path.join(self._root, self._names[index])

  def __reduce__(self):
    if self._index is not None:  # a worker process maps the index again instead of receiving every name
      return (_from_index, (self._index, self._root), {"limits": self.limits})
    names = Names(np.array(self._names.text), np.array(self._names.ends))
    arguments = (self._root, names, np.array(self._labels), self.class_names)
    return (FolderSource, arguments, {"limits": self.limits})


def open_folder(
  path: str, spec: str, *, cache_dir: str | os.PathLike | None = None, index: str = "auto"
) -> FolderSource:
  """The images below `path`, from its index if that holds, else listed.

  Hidden files and folders are left out; links are followed, except into a folder that contains the link.

  Args:
    path: the folder.
    spec: the specification that it comes from, for messages.
    cache_dir: where indices are kept.
    index: "auto": read one that holds; write one into the cache for a large folder. "cache", "beside": list the folder
      and write one into the cache, or beside the folder as PATH.vit_jax_index, which goes with it to other machines.

  Raises:
    ValueError: if there is no such folder, or no image in it; it says what was found instead.
    OSError: if an index that was asked for cannot be written.
  """
  root = storage.local(path).rstrip("/") or "/"
  places = [index_path("folder", root, cache_dir)]
  if not storage.is_remote(root):
    places.insert(0, Path(root + _SUFFIX))
    _check_folder(Path(root), spec)
  if index == "auto":
    for place in places:
      if (source := _held(place, root)) is not None:
        return source
  listing = _list_remote(root) if storage.is_remote(root) else _list_local(root)
  source = listing.source(root, spec)
  if index == "beside" and storage.is_remote(root):
    raise ValueError(
      f"data.source = {spec!r}: beside a folder of an object store no index can be written; use the cache."
    )
  place = places[0] if index == "beside" else places[-1]
  if index != "auto" or len(source) >= _INDEXED:
    try:
      listing.write(place, root, source)
    except OSError as error:
      if index != "auto":
        raise
      log.warning("cannot keep the list of %s in %s (%s): the folder is listed at every start", root, place, error)
      return source
    source = _from_index(place, root)
  if "train" in source.class_names and {"val", "validation", "test"} & set(source.class_names):
    log.warning("%s holds splits, which now count as classes: did you mean folder:%s/train?", root, root)
  return source


def _check_folder(root: Path, spec: str) -> None:
  if not root.exists():
    raise ValueError(f"data.source = {spec!r}: there is no {root}; {storage.contents(str(root))}.")
  if not root.is_dir():
    raise ValueError(f"data.source = {spec!r}: {root} is a file; give the folder that holds the images.")


class _Listing:
  """What a walk has found: images, their classes, folders with the times of their last change, other files."""

  def __init__(self):
    self.text, self.ends, self.labels = bytearray(), array.array("q"), array.array("i")  # ten million fit
    self.classes: dict[str, int] = {}
    self.others: collections.Counter[str] = collections.Counter()
    self.folders: list[tuple[str, int]] = []
    self.begun = time.time_ns()

  def add(self, file: str) -> None:
    extension = os.path.splitext(file)[1].lower()
    if extension not in EXTENSIONS:
      self.others[extension or "no extension"] += 1
      return
    self.text += os.fsencode(file)
    self.ends.append(len(self.text))
    first, slash, _ = file.partition("/")
    self.labels.append(self.classes.setdefault(first, len(self.classes)) if slash else -1)

  def source(self, root: str, spec: str) -> FolderSource:
    if not self.ends:
      found = ", ".join(f"{count} x {extension}" for extension, count in self.others.most_common(8))
      found = f"only other files ({found})" if found else "no files at all"
      raise ValueError(f"data.source = {spec!r}: {root} holds {found}; images are {', '.join(EXTENSIONS)}.")
    names = Names(np.frombuffer(bytes(self.text), np.uint8), np.array(self.ends, np.int64))
    # Numbered as met; the walk is sorted, so that this is the order of their names on a disk but not in a store,
    # where "a-b/" comes before "a/".
    ordered = sorted(self.classes)
    rank = np.array([ordered.index(name) for name in self.classes] + [-1], np.int32)  # [..., of no class]
    return FolderSource(root, names, rank[np.array(self.labels, np.int64)], tuple(ordered))

  def write(self, place: Path, root: str, source: FolderSource) -> None:
    folders = Names.of(name for name, _ in self.folders)
    about = {"root": root, "classes": list(source.class_names), "begun": self.begun}
    arrays = {
      "text": source._names.text,
      "ends": source._names.ends,
      "labels": source._labels,
      "folders": folders.text,
      "folder_ends": folders.ends,
      "changed": np.array([changed for _, changed in self.folders], np.int64),
    }
    write_index(place, about, arrays)
    log.info("%s: %d images listed in %.1f s, index written to %s", root, len(source), self.seconds(), place)

  def seconds(self) -> float:
    return (time.time_ns() - self.begun) / 1e9


def _list_local(root: str) -> _Listing:
  listing = _Listing()
  _walk(root, "", (), listing)
  return listing


def _list_remote(root: str) -> _Listing:
  listing = _Listing()
  for file in storage.remote_files(root):
    if not any(part.startswith(".") for part in file.split("/")):
      listing.add(file)
  return listing


def _walk(folder: str, prefix: str, ancestors: tuple[tuple[int, int], ...], listing: _Listing) -> None:
  """Adds what lies below `folder`, sorted, as paths relative to where the walk began."""
  try:
    status = os.stat(folder)
    with os.scandir(folder) as entries:
      found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
  except OSError as error:
    log.warning("left out %s: %s", folder, error)
    listing.folders.append((prefix, -1))  # an index of this never holds
    return
  identity = (status.st_dev, status.st_ino)
  if identity in ancestors:
    log.warning("left out %s: it links back to a folder that contains it", folder)
    return
  listing.folders.append((prefix, status.st_mtime_ns))
  for name, is_folder in found:
    if is_folder:
      _walk(os.path.join(folder, name), f"{prefix}{name}/", (*ancestors, identity), listing)
    else:
      listing.add(prefix + name)


def _held(place: Path, root: str) -> FolderSource | None:
  """The source of an index, if it is there and still holds."""
  if not place.exists():
    return None
  try:
    about, arrays = read_index(place)
    reason = None if storage.is_remote(root) else _staleness(root, about, arrays)
  except (OSError, ValueError, KeyError) as error:
    reason = f"it cannot be read ({error})"
  if reason is not None:
    log.info("the index %s no longer holds: %s; listing the folder again", place, reason)
    return None
  if storage.is_remote(root):
    age = (time.time_ns() - about["begun"]) / 3.6e12
    log.info("%s as listed %.1f hours ago; `vit-jax data scan` lists it again", root, age)
  return _from_index(place, root)


def _staleness(root: str, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> str | None:
  """Why an index does not hold; None: it does."""
  folders, changed = Names(arrays["folders"], arrays["folder_ends"]), arrays["changed"]
  if len(changed) and int(changed.max()) > about["begun"] - _RACE:
    return "a folder was changed while it was made"

  def now(i: int) -> int:
    try:
      return os.stat(os.path.join(root, folders[i])).st_mtime_ns
    except OSError:
      return -1

  with ThreadPoolExecutor(16) as pool:  # a network's file system answers many questions at once
    for i, time_ns in enumerate(pool.map(now, range(len(changed)), chunksize=64)):
      if time_ns != changed[i]:
        return f"{os.path.join(root, folders[i])} has changed"
  return None


def _from_index(place: Path, root: str | None = None) -> FolderSource:
  about, arrays = read_index(place)
  names = Names(arrays["text"], arrays["ends"])
  return FolderSource(root or about["root"], names, arrays["labels"], tuple(about["classes"]), index=place)
