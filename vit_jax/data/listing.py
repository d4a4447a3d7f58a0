"""What lies below a folder: the images and their classes, and what is left out of them and why.

No single entry can end the walk or take others with it: links that lead nowhere, back to themselves or to a folder that
contains them, folders that may not be read, paths that are too long, pipes, sockets and devices are counted and named.
"""

from __future__ import annotations

import array
import errno
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np

from vit_jax.data import hints, storage
from vit_jax.data.classes import shown_name
from vit_jax.data.formats import START
from vit_jax.data.index import Names
from vit_jax.data.left_out import LeftOut

_LONGEST = 4095  # bytes of a path that the operating system opens
_MOST_VISITS = 100  # of a folder by links: the paths through folders that link to each other grow as a factorial
_REASONS = {
  errno.ENOENT: "link to nothing",
  errno.ENOTDIR: "link to nothing",
  errno.ELOOP: "link that leads back to itself",
  errno.EACCES: "without permission to read it",
  errno.EPERM: "without permission to read it",
  errno.ENAMETOOLONG: "path that is too long",
}
_SYSTEM = "folder of the operating system or the storage"
_SPECIAL = {"named pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK, "device": stat.S_ISCHR, "disk": stat.S_ISBLK}
# Folders that systems and storage devices put among those of a user; what is in them are thumbnails and deleted files.
_OF_SYSTEMS = {"__MACOSX", "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
_FILE, _FOLDER, _LINKED_FOLDER = range(3)


class Listing:
  """What a walk has found.

  Attributes:
    folders: (path, time of its last change in ns) of each that was listed.
    unsettled: paths of what could not be looked at, which may change without its folder being changed.
    left_out: everything else that is below the folder.
    begun: when, in ns.
  """

  def __init__(self):
    self._text, self._ends, self._labels = bytearray(), array.array("q"), array.array("i")  # ten million fit
    self._classes: dict[str, int] = {}
    self.folders: list[tuple[str, int]] = []
    self.unsettled: list[str] = []
    self.left_out = LeftOut()
    self.begun = time.time_ns()

  def __len__(self) -> int:
    return len(self._ends)

  def add(self, file: str, path: str | None = None) -> None:
    """Takes a file for what its name says it is; `path`: where to look at its content if its name does not say."""
    if not hints.is_image(file) and not (path is not None and hints.may_be_image(file) and _holds_image(path)):
      reason, expected = hints.reason(file)
      self.left_out.add(reason, file, expected=expected)
      return
    self._text += os.fsencode(file)
    self._ends.append(len(self._text))
    first, slash, _ = file.partition("/")
    self._labels.append(self._classes.setdefault(first, len(self._classes)) if slash else -1)

  def failed(self, file: str, error: OSError) -> None:
    """Leaves out what cannot be looked at."""
    self.left_out.add(_REASONS.get(error.errno) or f"not readable ({error.strerror or error})", file)
    self.unsettled.append(file)

  def images(self) -> tuple[Names, np.ndarray, tuple[str, ...]]:
    """(paths, classes int32 [N], class names) of the images."""
    names = Names(np.frombuffer(bytes(self._text), np.uint8), np.array(self._ends, np.int64))
    # Numbered as met; the walk is sorted, so that this is the order of their names on a disk but not in a store,
    # where "a-b/" comes before "a/".
    ordered = sorted(self._classes)
    place = {name: i for i, name in enumerate(ordered)}
    rank = np.array([place[name] for name in self._classes] + [-1], np.int32)  # [..., of no class]
    return names, rank[np.array(self._labels, np.int64)], tuple(map(shown_name, ordered))

  def seconds(self) -> float:
    return (time.time_ns() - self.begun) / 1e9


def list_local(root: str) -> Listing:
  """What lies below a folder, sorted, as paths relative to it. Links are followed."""
  return _Walk(root).listing


def list_remote(root: str) -> Listing:
  """What lies below a folder of an object store, sorted, as paths relative to it."""
  listing = Listing()
  for file, kind in storage.remote_files(root):
    if not file or file.endswith("/"):
      continue  # stands for a folder
    if any(part.startswith(".") for part in file.split("/")):
      listing.left_out.add("hidden", file, expected=True)
    elif not _OF_SYSTEMS.isdisjoint(file.split("/")[:-1]):
      listing.left_out.add(_SYSTEM, file, expected=True)
    elif kind != "file":
      listing.left_out.add(f"of the store's kind {kind!r}", file)
    else:
      listing.add(file)
  return listing


def settled(path: str) -> bool:
  """Whether what could not be looked at still cannot be."""
  try:
    if stat.S_ISDIR(os.stat(path).st_mode):
      with os.scandir(path) as entries:
        for _ in entries:
          pass
  except OSError:
    return True
  return False


class _Walk:
  """Goes through a folder and all below it, depth first; without calling itself, as trees may be deeper than that."""

  def __init__(self, root: str):
    self.listing = Listing()
    self._root = root
    self._ancestors: list[tuple[int, int]] = []  # (device, number) of the folders whose entries are being taken
    self._visits: Counter[tuple[int, int]] = Counter()  # by links
    waiting = []  # of (path, whether a link led there, its entries that are still to be taken)
    if (top := self._enter("", linked=False)) is not None:
      waiting.append(("", False, top))
    while waiting:
      prefix, linked, entries = waiting[-1]
      name, kind = next(entries, (None, _FILE))
      if name is None:
        waiting.pop()
        self._ancestors.pop()
      elif kind == _FILE:
        self._add(prefix + name)
      else:
        through, inside = linked or kind == _LINKED_FOLDER, f"{prefix}{name}/"
        if (below := self._enter(inside, through)) is not None:
          waiting.append((inside, through, below))

  def _enter(self, prefix: str, linked: bool) -> Iterator[tuple[str, int]] | None:
    """The entries of a folder, which is now an ancestor; None: it is left out."""
    path, listing = os.path.join(self._root, prefix), self.listing
    try:
      status = os.stat(path)
      identity = (status.st_dev, status.st_ino)
      if identity in self._ancestors:
        listing.left_out.add("link to a folder that contains it", prefix)
        return None
      self._visits[identity] += linked
      if linked and self._visits[identity] > _MOST_VISITS:
        listing.left_out.add(f"link to a folder that {_MOST_VISITS} other links lead to", prefix)
        return None
      found = self._entries(path, prefix)
    except OSError as failure:
      listing.failed(prefix or self._root, failure)
      return None
    listing.folders.append((prefix, status.st_mtime_ns))
    self._ancestors.append(identity)
    return iter(found)

  def _entries(self, path: str, prefix: str) -> list[tuple[str, int]]:
    """The entries of a folder that are files and folders, sorted; those that came before it failed, if it does."""
    found: list[tuple[str, int]] = []
    with os.scandir(path) as entries:
      try:
        for entry in entries:
          if (kind := self._kind(entry, prefix)) is not None:
            found.append((entry.name, kind))
      except OSError as error:
        self.listing.failed(prefix or self._root, error)
    return sorted(found)

  def _kind(self, entry: os.DirEntry, prefix: str) -> int | None:
    """Whether an entry is a file or a folder, links followed; None: it is left out."""
    left_out, name = self.listing.left_out, prefix + entry.name
    if entry.name.startswith("."):
      left_out.add("hidden", name, expected=True)
      return None
    try:
      if entry.is_dir():
        if entry.name in _OF_SYSTEMS:
          left_out.add(_SYSTEM, name, expected=True)
          return None
        return _LINKED_FOLDER if entry.is_symlink() else _FOLDER
      if entry.is_file():
        return _FILE
      mode = entry.stat().st_mode  # of a link to nothing there is none
      left_out.add(next((what for what, of_kind in _SPECIAL.items() if of_kind(mode)), "no file and no folder"), name)
    except OSError as error:
      self.listing.failed(name, error)
    return None

  def _add(self, file: str) -> None:
    path = os.path.join(self._root, file)
    if len(os.fsencode(path)) > _LONGEST:
      self.listing.left_out.add(_REASONS[errno.ENAMETOOLONG], file)
    else:
      self.listing.add(file, path)


def _holds_image(path: str) -> bool:
  """Whether the content of a file is that of an image."""
  try:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe may have taken its place
    try:
      return hints.told_by(os.read(descriptor, START)) is not None
    finally:
      os.close(descriptor)
  except OSError:
    return False
