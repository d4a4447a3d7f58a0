"""Writing small files: a reader, and whoever comes after a power cut, sees the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
  """Writes a file under a temporary name, puts it on the disk, and renames it; its folder must be there.

  Raises:
    OSError: if it cannot be written; what was there stays.
  """
  path = Path(path)
  unfinished = path.with_name(f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.partial")
  try:
    with open(unfinished, "xb") as file:
      file.write(content)
      file.flush()
      with contextlib.suppress(OSError):  # there was no file before
        os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(unfinished)
    raise
  _sync_folder(path.parent)


def write_text(path: str | os.PathLike, text: str) -> None:
  """`write_bytes` of a text in UTF-8."""
  write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, value: Any, *, indent: int | None = None) -> None:
  """`write_bytes` of a value in JSON, with a newline at the end."""
  write_text(path, json.dumps(value, indent=indent) + "\n")


def append(descriptor: int, content: bytes) -> None:
  """Adds bytes to an open file, all of them or, where there is no space for all, none.

  Raises:
    OSError: if they cannot be written.
  """
  before = os.fstat(descriptor).st_size
  written = 0
  try:
    while written < len(content):  # a full disk takes a part, and says so with the next call
      written += os.write(descriptor, content[written:])
  except OSError:
    if written:
      with contextlib.suppress(OSError):
        os.ftruncate(descriptor, before)
    raise


def _sync_folder(folder: Path) -> None:
  """Puts a new name on the disk; file systems that cannot do that for a folder are left alone."""
  with contextlib.suppress(OSError):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
