"""Files on disks and in object stores by one set of functions.

A path with a scheme, such as gs://bucket/folder or s3://bucket/folder, is opened by fsspec, whose driver for that store
must be installed (gcsfs, s3fs, …); every other path is a local one.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from vit_jax.data.errors import BadImage
from vit_jax.data.left_out import LeftOut, printable
from vit_jax.data.limits import DEFAULT, Limits

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_EXPANDED = 1_000_000  # files that {000..127} may stand for
_MOST_SHOWN = 8  # entries of a folder in a message


def is_remote(path: str) -> bool:
  """Whether a path belongs to an object store."""
  return "://" in path


def local(path: str) -> str:
  """A local path with ~ replaced, absolute; a remote one as it is."""
  return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def matches(pattern: str, left_out: LeftOut | None = None) -> list[str]:
  """The files that match a pattern, sorted: *, ?, [], **, and {000..127}, as the shards of WebDataset are written.

  Args:
    pattern: of their paths.
    left_out: where to count what matches and is no file, and each of {000..127} that does not exist.

  Raises:
    ValueError: if {…} stands for more than a million.
  """
  found: set[str] = set()
  left_out = LeftOut() if left_out is None else left_out
  for one in _expanded(pattern):
    if is_remote(one):
      store, inside = _store(one)
      new = {store.unstrip_protocol(path) for path in store.glob(inside)}
    else:
      paths = {os.path.abspath(path) for path in glob.glob(os.path.expanduser(one), recursive=True)}
      new = {path for path in paths if os.path.isfile(path)}
      for path in sorted(paths - new):
        left_out.add("folder that matches the pattern" if os.path.isdir(path) else "no file", path)
    if not new and not glob.has_magic(one):
      left_out.add("file that does not exist", one)
    found |= new
  return sorted(found)


def open_file(path: str) -> BinaryIO:
  """Opens a file to be read."""
  if is_remote(path):
    store, inside = _store(path)
    return store.open(inside, "rb")
  return open(path, "rb")


def read(path: str | os.PathLike, limits: Limits = DEFAULT) -> bytes:
  """The whole content of a file; of one that is larger than `limits` allows, one byte beyond at most.

  Raises:
    BadImage: if it is larger, or is a device, a FIFO or a socket, which may have no end or never answer.
    OSError: if it cannot be read.
  """
  if is_remote(os.fspath(path)):
    data = _read_remote(os.fspath(path), limits.max_file_bytes + 1)
    limits.check_bytes(len(data), os.fspath(path))
    return data
  descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a FIFO that nobody writes to would hang
  with open(descriptor, "rb") as file:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
      raise IsADirectoryError(f"{path} is a folder")
    if not stat.S_ISREG(status.st_mode):
      raise BadImage(os.fspath(path), "is no regular file but a device, a FIFO or a socket")
    limits.check_bytes(status.st_size, os.fspath(path))
    return file.read(status.st_size)


def _read_remote(path: str, most: int) -> bytes:
  store, inside = _store(path)
  try:
    return store.cat_file(inside, start=0, end=most)
  except (OSError, ValueError):
    if store.size(inside) == 0:  # of nothing no part can be asked for
      return b""
    raise


def read_range(path: str, start: int, length: int) -> bytes:
  """`length` bytes of a file from `start` on; fewer if it ends before."""
  if is_remote(path):
    store, inside = _store(path)
    return store.cat_file(inside, start=start, end=start + length)
  descriptor = os.open(path, os.O_RDONLY)
  try:
    parts = []
    while length > 0 and (part := os.pread(descriptor, length, start)):
      parts.append(part)
      start, length = start + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
  finally:
    os.close(descriptor)


def version(path: str) -> tuple[int, str]:
  """(size, what changes when the file is written again): to see whether an index of it still holds."""
  if is_remote(path):
    store, inside = _store(path)
    info = store.info(inside)
    return int(info["size"]), str(info.get("etag") or info.get("ETag") or info.get("mtime") or info.get("created"))
  status = os.stat(path)
  return status.st_size, str(status.st_mtime_ns)


def remote_files(folder: str) -> list[tuple[str, str]]:
  """(path relative to it, kind: "file" or what the store calls it) of all below a folder of an object store, sorted."""
  store, inside = _store(folder)
  prefix = inside.rstrip("/") + "/"
  return sorted((path.removeprefix(prefix), info["type"]) for path, info in store.find(inside, detail=True).items())


def exists(path: str) -> bool:
  if is_remote(path):
    store, inside = _store(path)
    return store.exists(inside)
  return os.path.exists(path)


def below(folder: str, path: str) -> str:
  """The file that a path in some data names, if it is below a folder, links resolved.

  Raises:
    ValueError: if it is elsewhere, as an absolute path, one with .. or a URL may be; or no regular file.
  """
  if is_remote(path) or re.match(r"[A-Za-z][\w+.-]*:", path) or "\0" in path:
    raise ValueError("is no path below the folder")
  if is_remote(folder):
    inside = posixpath.normpath(path)
    if inside.startswith(("/", "..")):
      raise ValueError(f"is not below {folder}")
    return f"{folder}/{inside}"
  root = os.path.realpath(folder)
  real = os.path.realpath(os.path.join(root, path))
  if os.path.commonpath([root, real]) != root:
    raise ValueError(f"is not below {folder}")
  if not os.path.isfile(real):
    raise ValueError("is no file" if os.path.lexists(real) else "does not exist")
  return real


def contents(pattern: str) -> str:
  """What lies where a pattern looked in vain: the nearest folder that exists, and its entries, for a message."""
  if is_remote(pattern):
    store, inside = _store(pattern.rpartition("/")[0])
    if not store.exists(inside):
      return f"there is no folder {inside}"
    names = sorted(path.rpartition("/")[2] for path in store.ls(inside, detail=False))
    return _shown(inside, names[:_MOST_SHOWN], len(names))
  folder = Path(os.path.expanduser(pattern)).absolute()
  folder = next(parent for parent in (folder, *folder.parents) if os.path.isdir(parent))
  try:
    names = sorted(os.listdir(folder))
  except OSError as error:
    return f"{folder} cannot be listed ({error.strerror})"
  shown = [name + ("/" if os.path.isdir(folder / name) else "") for name in names[:_MOST_SHOWN]]
  return _shown(str(folder), shown, len(names))


def _shown(folder: str, names: list[str], count: int) -> str:
  if not names:
    return f"{folder} is empty"
  more = f", … ({count} entries)" if count > len(names) else ""
  return f"{folder} holds {', '.join(map(printable, names))}{more}"


def _expanded(pattern: str) -> list[str]:
  """A pattern without {000..127}: one for each number, with as many digits as the first of them has."""
  found = _BRACES.search(pattern)
  if not found:
    return [pattern]
  first, last = found[1], found[2]
  if len(last) > 12 or int(last) - int(first) >= _MOST_EXPANDED:
    raise ValueError(f"data.source: {found[0]} in {pattern} stands for more than {_MOST_EXPANDED:,} files.")
  numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
  return [one for number in numbers for one in _expanded(pattern[: found.start()] + number + pattern[found.end() :])]


def _store(path: str) -> tuple[Any, str]:
  """(fsspec's file system of a remote path, the path inside it)."""
  import fsspec

  try:
    return fsspec.core.url_to_fs(path)
  except (ImportError, ValueError) as error:
    raise ValueError(f"data.source: {path} cannot be opened: {error}") from error
