"""Index files: a few large arrays and what is said about them in one file, read by mapping it into memory.

An index of ten million entries opens at once, and all processes of a machine share one copy of it.

    8 bytes   b"VJINDEX2"
    8 bytes   length of the header, unsigned, little-endian
    32 bytes  its SHA-256
    …         header, JSON: {"about": …, "arrays": {name: [type, shape, offset of its first byte]}}
    …         the arrays, each from a multiple of 64 bytes on
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import files

_MAGIC = b"VJINDEX2"
_START = len(_MAGIC) + 8 + hashlib.sha256().digest_size
_ALIGNMENT = 64


class Names:
  """Many strings in two arrays, which are mapped from a file as they are.

  Attributes:
    text: uint8, the strings one behind the other, as the file system encodes them.
    ends: int64 [N], where each ends.
  """

  def __init__(self, text: np.ndarray, ends: np.ndarray):
    self.text = text
    self.ends = ends

  @classmethod
  def of(cls, strings: Iterable[str]) -> Names:
    text, ends = bytearray(), []
    for string in strings:
      text += os.fsencode(string)
      ends.append(len(text))
    return cls(np.frombuffer(bytes(text), np.uint8), np.array(ends, np.int64))

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, index: int) -> str:
    if index < 0:
      index += len(self)
    start = int(self.ends[index - 1]) if index else 0
    return os.fsdecode(self.text[start : int(self.ends[index])].tobytes())


def cache_root(cache_dir: str | os.PathLike | None) -> Path:
  """The folder of what is kept between runs: the given one, $VIT_JAX_CACHE, or ~/.cache/vit_jax."""
  return Path(cache_dir or os.environ.get("VIT_JAX_CACHE") or "~/.cache/vit_jax").expanduser()


def index_path(kind: str, of: str, cache_dir: str | os.PathLike | None) -> Path:
  """Where the cache keeps the index of `of`, a path or a pattern."""
  return cache_root(cache_dir) / "indices" / f"{kind}-{hashlib.sha256(os.fsencode(of)).hexdigest()[:20]}.index"


def write_index(path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
  """Writes under a temporary name and renames: a reader sees all of it or nothing.

  Raises:
    OSError: if the folder cannot be written.
  """
  arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
  header: dict[str, Any] = {"about": dict(about), "arrays": {}}
  position = 0  # behind the header; made absolute by the reader
  for name, array in arrays.items():
    header["arrays"][name] = [array.dtype.str, array.shape, position]
    position += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
  text = json.dumps(header).encode()
  text += b" " * (-(_START + len(text)) % _ALIGNMENT)
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, name = tempfile.mkstemp(prefix=path.stem + ".", suffix=".part", dir=path.parent)
  try:
    with os.fdopen(descriptor, "wb") as file:
      file.write(_MAGIC + struct.pack("<Q", len(text)) + hashlib.sha256(text).digest() + text)
      for array in arrays.values():
        file.write(array.data if array.size else b"")
        file.write(b"\0" * (-array.nbytes % _ALIGNMENT))
      file.flush()
      os.fsync(file.fileno())
    os.chmod(name, 0o644)  # mkstemp lets only its user read
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """(what is said about the arrays, the arrays: mapped, read-only).

  Raises:
    OSError: if there is no such file.
    ValueError: if it is no index, one of another version, damaged, or not all of one.
  """
  if not path.is_file():
    raise files.DamagedFile(path, "is no file")
  size = path.stat().st_size
  with open(path, "rb") as file:
    start = file.read(_START)
    if len(start) < _START or start[: len(_MAGIC)] != _MAGIC:
      raise files.DamagedFile(path, "is no index of this version of vit_jax")
    (length,) = struct.unpack_from("<Q", start, len(_MAGIC))
    if _START + length > size:
      raise files.DamagedFile(path, "ends inside its header")
    text = file.read(length)
  if hashlib.sha256(text).digest() != start[len(_MAGIC) + 8 :]:
    raise files.DamagedFile(path, "its header is damaged")
  header = files.parse_json(text, path, kind=dict)
  behind = len(start) + length
  arrays = {}
  for name, (kind, shape, offset) in header["arrays"].items():
    dtype = np.dtype(kind)
    count = int(np.prod(shape))
    if behind + offset + count * dtype.itemsize > size:
      raise files.DamagedFile(path, "ends inside its arrays")
    if count == 0:
      arrays[name] = np.empty(shape, dtype)
    else:
      mapped = np.memmap(path, dtype, "r", behind + offset, tuple(shape))
      arrays[name] = mapped.view(np.ndarray)
  return header["about"], arrays
