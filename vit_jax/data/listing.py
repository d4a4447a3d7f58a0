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
from vit_jax.data.formats import START
from vit_jax.data.index import Names
from vit_jax.data.left_out import LeftOut, printable

_LONGEST = 4095  # bytes of a path that the operating system opens
_MOST_VISITS = 100  # of a folder by links: folders that link to each other have more paths than atoms have places
_REASONS = {
  errno.ENOENT: "link to nothing",
  errno.ENOTDIR: "link to nothing",
  errno.ELOOP: "link that leads back to itself",
  errno.EACCES: "without permission to read it",
  errno.EPERM: "without permission to read it",
  errno.ENAMETOOLONG: "path that is too long",
}
_SPECIAL = {"named pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK, "device": stat.S_ISCHR, "disk": stat.S_ISBLK}
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
    return names, rank[np.array(self._labels, np.int64)], tuple(map(printable, ordered))

  def seconds(self) -> float:
    return (time.time_ns() - self.begun) / 1e9


def list_local(root: str) -> Listing:
  """What lies below a folder, sorted, as paths relative to it. Links are followed."""
  listing = Listing()
  visits: Counter[tuple[int, int]] = Counter()
  ancestors: list[tuple[int, int]] = []  # (device, number) of the folders that are being walked

  def enter(prefix: str, linked: bool) -> Iterator[tuple[str, int]] | None:
    """The entries of a folder; it becomes an ancestor. None: it is left out."""
    path = os.path.join(root, prefix)
    try:
      status = os.stat(path)
      identity = (status.st_dev, status.st_ino)
      if identity in ancestors:
        listing.left_out.add("link to a folder that contains it", prefix)
        return None
      visits[identity] += linked
      if linked and visits[identity] > _MOST_VISITS:
        listing.left_out.add(f"link to a folder that {_MOST_VISITS} other links lead to", prefix)
        return None
      found, error = _entries(path, prefix, listing)
    except OSError as failure:
      listing.failed(prefix or root, failure)
      return None
    if error is not None:
      listing.failed(prefix or root, error)
    listing.folders.append((prefix, status.st_mtime_ns))
    ancestors.append(identity)
    return iter(found)

  top = enter("", linked=False)
  stack = [("", False, top)] if top is not None else []  # of (path, whether it was reached by a link, its entries)
  while stack:
    prefix, linked, entries = stack[-1]
    name, kind = next(entries, (None, _FILE))
    if name is None:
      stack.pop()
      ancestors.pop()
    elif kind == _FILE:
      _add(root, prefix + name, listing)
    else:
      through = linked or kind == _LINKED_FOLDER
      below = enter(f"{prefix}{name}/", through)
      if below is not None:
        stack.append((f"{prefix}{name}/", through, below))
  return listing


def list_remote(root: str) -> Listing:
  """What lies below a folder of an object store, sorted, as paths relative to it."""
  listing = Listing()
  for file, kind in storage.remote_files(root):
    if any(part.startswith(".") for part in file.split("/")):
      listing.left_out.add("hidden", file, expected=True)
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


def _entries(path: str, prefix: str, listing: Listing) -> tuple[list[tuple[str, int]], OSError | None]:
  """(the entries of a folder that are files and folders, sorted; what kept it from being listed to its end)."""
  found: list[tuple[str, int]] = []
  failure = None
  with os.scandir(path) as entries:
    try:
      for entry in entries:
        if entry.name.startswith("."):
          listing.left_out.add("hidden", prefix + entry.name, expected=True)
          continue
        try:
          kind = _kind(entry)
        except OSError as error:
          listing.failed(prefix + entry.name, error)
          continue
        if isinstance(kind, str):
          listing.left_out.add(kind, prefix + entry.name)
        else:
          found.append((entry.name, kind))
    except OSError as error:
      failure = error
  return sorted(found), failure


def _kind(entry: os.DirEntry) -> int | str:
  """What an entry is, links followed; as text: something that holds no images.

  Raises:
    OSError: if it is nothing that can be looked at, such as a link to nothing.
  """
  if entry.is_dir():
    return _LINKED_FOLDER if entry.is_symlink() else _FOLDER
  if entry.is_file():
    return _FILE
  mode = entry.stat().st_mode  # of a link to nothing there is none
  return next((what for what, of_kind in _SPECIAL.items() if of_kind(mode)), "no file and no folder")


def _add(root: str, file: str, listing: Listing) -> None:
  path = os.path.join(root, file)
  if len(os.fsencode(path)) > _LONGEST:
    listing.left_out.add(_REASONS[errno.ENAMETOOLONG], file)
  else:
    listing.add(file, path)


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
