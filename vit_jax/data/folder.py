"""`folder:/path`: every image below a folder, at any depth, on a disk or in an object store.

The list of a large folder is kept as an index (`index.py`), so that ten million images are open in seconds. The times
at which the folders were last changed say whether it still holds: to add, remove or rename a file changes its folder's.
An object store has no such times; its index holds until `vit-jax data scan` makes it again.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data import hints, listing, storage
from vit_jax.data.formats import EXTENSIONS
from vit_jax.data.index import Names, index_path, read_index, write_index
from vit_jax.data.left_out import LeftOut, printable
from vit_jax.data.limits import DEFAULT
from vit_jax.data.listing import Listing

log = logging.getLogger(__name__)

_INDEXED = 10_000  # images from which on an index is written without being asked for
_SUFFIX = ".vit_jax_index"  # of an index beside its folder
_RACE = 1_000_000_000  # ns: a folder changed this shortly before it was listed may change again unseen
_FORM = 3  # of the index; one of another form is made again


class FolderSource:
  """The images below a folder, in sorted order; the class of an image is its first sub-folder, if it has one.

  Files are read when they are asked for: one that is damaged or has vanished is met then.
  """

  def __init__(
    self,
    root: str,
    names: Names,
    labels: np.ndarray,
    class_names: tuple[str, ...],
    index: Path | None = None,
    *,
    left_out: LeftOut,
  ):
    self._root = root
    self._names = names  # relative to the root, "/" between the parts
    self._labels = labels  # int32 [N]
    self._index = index
    self.class_names = class_names
    self.num_classes = len(class_names)
    self.left_out = left_out
    self.remote = storage.is_remote(root)
    self.limits = DEFAULT

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> dict[str, bytes | int]:
    return {"image": storage.read(self._path(index), self.limits), "label": int(self._labels[index])}

  def describe(self, index: int) -> str:
    return printable(self._path(index))

  def _path(self, index: int) -> str:
    return os.path.join(self._root, self._names[index])

  def __reduce__(self):
    if self._index is not None:  # a worker process maps the index again instead of receiving every name
      return (_from_index, (self._index, self._root), {"limits": self.limits})
    names = Names(np.array(self._names.text), np.array(self._names.ends))
    arguments = (self._root, names, np.array(self._labels), self.class_names, self.left_out)
    return (_from_parts, arguments, {"limits": self.limits})


def _from_parts(root: str, names: Names, labels: np.ndarray, classes: tuple[str, ...], left_out: LeftOut) -> Any:
  return FolderSource(root, names, labels, classes, left_out=left_out)


def open_folder(
  path: str, spec: str, *, cache_dir: str | os.PathLike | None = None, index: str = "auto"
) -> FolderSource:
  """The images below `path`, from its index if that holds, else listed.

  Links are followed, except into a folder that contains the link. What is no image, hidden or cannot be looked at is
  left out, counted and named (`listing.py`).

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
  found = listing.list_remote(root) if storage.is_remote(root) else _list_local(root)
  source = _source(found, root, spec)
  if index == "beside" and storage.is_remote(root):
    raise ValueError(
      f"data.source = {spec!r}: beside a folder of an object store no index can be written; use the cache."
    )
  place = places[0] if index == "beside" else places[-1]
  if index != "auto" or len(source) >= _INDEXED:
    try:
      _write(found, place, root, source)
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
  if not os.path.exists(root):
    raise ValueError(f"data.source = {spec!r}: there is no {root}; {storage.contents(str(root))}.")
  if not os.path.isdir(root):
    meant = hints.spec_of_path(str(root))
    hint = "" if meant.startswith("folder:") else f" Did you mean {meant}?"
    kind = hints.reason(root.name)[0].partition(": ")[2]
    kind = f" ({kind})" if kind and not hint else ""
    raise ValueError(f"data.source = {spec!r}: {root} is a file{kind}; give the folder that holds the images.{hint}")


def _source(found: Listing, root: str, spec: str) -> FolderSource:
  if not len(found):
    what = f"only what is left out: {found.left_out.text()}" if found.left_out else "no files at all"
    meant = hints.did_you_mean(root, (name for reason in found.left_out.values() for name in reason.examples))
    raise ValueError(f"data.source = {spec!r}: {root} holds {what}; images are {', '.join(EXTENSIONS)}.{meant}")
  return FolderSource(root, *found.images(), left_out=found.left_out)


def _write(found: Listing, place: Path, root: str, source: FolderSource) -> None:
  folders, unsettled = Names.of(name for name, _ in found.folders), Names.of(found.unsettled)
  about = {
    "form": _FORM,
    "root": root,
    "classes": list(source.class_names),
    "begun": found.begun,
    "left_out": source.left_out.to_json(),
  }
  arrays = {
    "text": source._names.text,
    "ends": source._names.ends,
    "labels": source._labels,
    "folders": folders.text,
    "folder_ends": folders.ends,
    "changed": np.array([changed for _, changed in found.folders], np.int64),
    "unsettled": unsettled.text,
    "unsettled_ends": unsettled.ends,
  }
  write_index(place, about, arrays)
  log.info("%s: %d images listed in %.1f s, index written to %s", root, len(source), found.seconds(), place)


def _list_local(root: str) -> Listing:
  return listing.list_local(root)


def _held(place: Path, root: str) -> FolderSource | None:
  """The source of an index, if it is there and still holds."""
  if not place.exists():
    return None
  try:
    about, arrays = read_index(place)
    if about.get("form") != _FORM:
      reason = "an earlier version of this package made it"
    else:
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
    unsettled = Names(arrays["unsettled"], arrays["unsettled_ends"])
    paths = [os.path.join(root, unsettled[i]) for i in range(len(unsettled))]
    for path, still in zip(paths, pool.map(listing.settled, paths, chunksize=64), strict=True):
      if not still:
        return f"{printable(path)}, which could not be looked at, now can be"
  return None


def _from_index(place: Path, root: str | None = None) -> FolderSource:
  about, arrays = read_index(place)
  names = Names(arrays["text"], arrays["ends"])
  classes, left_out = tuple(about["classes"]), LeftOut(about["left_out"])
  return FolderSource(root or about["root"], names, arrays["labels"], classes, index=place, left_out=left_out)
