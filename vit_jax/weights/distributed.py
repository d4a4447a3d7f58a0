"""Folders of torch.distributed.checkpoint, as DINOv3 saves its training: tensors in pieces over the files of a job.

`.metadata` is a pickle that says of every tensor its size and its chunks (offsets and sizes), and of every chunk in
which file `__<process>_<number>.distcp` it is, from which byte on and how many: each is what torch.save makes of one
tensor. Source: torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vit_jax.weights import bounds, pickles
from vit_jax.weights.archive import Archive
from vit_jax.weights.errors import Unreadable, WeightsError, reading, shown
from vit_jax.weights.lazy import LazyTensor
from vit_jax.weights.pickles import Foreign
from vit_jax.weights.pth import open_record
from vit_jax.weights.storages import builders, dtype_of

METADATA = ".metadata"
_CLASSES = "torch.distributed.checkpoint."
_MOST_CHUNKS = 1 << 20  # of a tensor

Index = tuple[int, ...]


class _Place(NamedTuple):
  """Where the bytes of a chunk are."""

  file: str
  start: int
  length: int


def open_distributed(folder: pathlib.Path) -> dict[str, LazyTensor | Foreign]:
  """The tensors of a folder by their names in the saved state, parts of them joined by dots; none is read yet.

  What is no tensor (the iteration, settings of the optimizer) is a `Foreign`.

  Raises:
    WeightsError: if it is damaged, lacks a file or a part of a tensor, or claims more than its bytes are worth.
  """
  path = folder / METADATA
  with reading(path):
    files = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
    stored = sum(files.values())
    root, _ = pickles.load(path.read_bytes(), builders(stored), most=bounds.most_operations(stored))
    state = _fields(root, "metadata.Metadata")
    places = _places(state["storage_data"], files, folder)
    return {
      name: _entry(name, entry, places.get(name, {}), folder, stored)
      for name, entry in state["state_dict_metadata"].items()
      if type(name) is str
    }


def _fields(value: Any, kind: str) -> Mapping[str, Any]:
  """The fields of an object of a class of torch.distributed.checkpoint."""
  if not isinstance(value, Foreign) or str(value) != _CLASSES + kind or type(value.state) is not dict:
    raise Unreadable(f"it has a {shown(str(value))} where a {kind} should be")
  return value.state


def _places(storage: Any, files: Mapping[str, int], folder: pathlib.Path) -> dict[str, dict[Index | None, _Place]]:
  """Where each chunk is, by the name of its tensor and its offsets."""
  found: dict[str, dict[Index | None, _Place]] = {}
  absent: set[str] = set()
  for index, info in storage.items():
    at, info = _fields(index, "metadata.MetadataIndex"), _fields(info, "filesystem._StorageInfo")
    place = _Place(info["relative_path"], info["offset"], info["length"])
    if type(place.file) is not str or type(place.start) is not int or type(place.length) is not int:
      raise Unreadable("it says of a chunk no place")
    if info.get("transform_descriptors"):
      raise Unreadable("its files are compressed or encrypted, which is not read: save it again without extensions")
    if place.file != pathlib.PurePath(place.file).name or place.file in ("", ".", ".."):
      raise Unreadable(f"it refers to {shown(place.file)}, which is not in the folder")
    if place.file not in files:
      absent.add(place.file)
    elif place.start < 0 or place.length < 0 or place.start + place.length > files[place.file]:
      raise WeightsError(f"{folder / place.file} is cut short, or is not the one that {METADATA} describes.")
    fqn, offset = at.get("fqn"), at.get("offset")
    if type(fqn) is not str or not (offset is None or _is_shape(offset)):
      raise Unreadable("it says of a chunk no tensor")
    found.setdefault(fqn, {})[offset] = place
  if absent:
    names = ", ".join(shown(name) for name in sorted(absent)[:3])
    raise WeightsError(
      f"{folder} lacks {len(absent)} of the files that its {METADATA} names: {names}{', …' if len(absent) > 3 else ''}."
    )
  return found


def _entry(
  name: str, entry: Any, places: Mapping[Index | None, _Place], folder: pathlib.Path, stored: int
) -> LazyTensor | Foreign:
  if not isinstance(entry, Foreign) or str(entry) != f"{_CLASSES}metadata.TensorStorageMetadata":
    return entry if isinstance(entry, Foreign) else Foreign(type(entry).__name__, ())
  fields = _fields(entry, "metadata.TensorStorageMetadata")
  dtype = _dtype(fields["properties"])
  if dtype is None:
    return Foreign("a tensor of a type that is not read", ())
  size = fields["size"]
  chunks = [_fields(chunk, "metadata.ChunkStorageMetadata") for chunk in fields["chunks"]]
  parts = [(chunk["offsets"], chunk["sizes"]) for chunk in chunks]
  _check_chunks(name, size, parts, places)
  bounds.check_bytes(math.prod(size) * dtype.itemsize, stored, f"{shown(name)} {tuple(size)}")

  def read() -> np.ndarray:
    if len(parts) == 1:
      return _read(folder, places[parts[0][0]], size, dtype, name)
    whole = np.empty(size, dtype)
    for offsets, sizes in parts:
      inside = tuple(slice(start, start + count) for start, count in zip(offsets, sizes, strict=True))
      if math.prod(sizes):
        whole[inside] = _read(folder, places[offsets], sizes, dtype, name)
    return whole

  return LazyTensor(size, dtype, read)


def _dtype(properties: Any) -> np.dtype | None:
  """The type of the elements: the first of the values that stand for a TensorProperties."""
  state = properties.state if isinstance(properties, Foreign) else None
  if type(state) is dict:
    return dtype_of(state.get("dtype"))
  return dtype_of(state[0]) if type(state) is tuple and state else None


def _check_chunks(
  name: str, size: Any, parts: list[tuple[Index, Index]], places: Mapping[Index | None, _Place]
) -> None:
  """Raises unless the chunks are a tensor without gap and without overlap, and all are there."""
  shapes = [size, *(shape for part in parts for shape in part)]
  if len(parts) > _MOST_CHUNKS or not all(_is_shape(shape) and len(shape) == len(size) for shape in shapes):
    raise Unreadable(f"{shown(name)} is malformed")
  filled = [(offsets, sizes) for offsets, sizes in parts if math.prod(sizes)]
  lost = [offsets for offsets, _ in filled if offsets not in places]
  inside = all(
    o + n <= whole for offsets, sizes in filled for o, n, whole in zip(offsets, sizes, size, strict=True)
  )
  volume = sum(math.prod(sizes) for _, sizes in filled)
  if lost or not inside or volume != math.prod(size) or not _apart(filled):
    raise Unreadable(f"parts of {shown(name)} are missing, or lie over each other")


def _is_shape(value: Any) -> bool:
  return type(value) is tuple and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _apart(parts: list[tuple[Index, Index]]) -> bool:
  """Whether no two chunks overlap: of those sorted by the first axis, each is compared with those that reach it."""
  active: list[tuple[Index, Index]] = []
  for offsets, sizes in sorted(parts):
    active = [(o, n) for o, n in active if not offsets or o[0] + n[0] > offsets[0]]
    for o, n in active:
      if all(a < b + m and b < a + k for a, k, b, m in zip(o, n, offsets, sizes, strict=True)):
        return False
    active.append((offsets, sizes))
  return True


def _read(folder: pathlib.Path, place: _Place, size: Index, dtype: np.dtype, name: str) -> np.ndarray:
  path = folder / place.file
  tensor = open_record(Archive(path, place.start, place.length), path)
  if not isinstance(tensor, LazyTensor) or tensor.shape != tuple(size) or tensor.dtype != dtype:
    raise WeightsError(f"{path}: the part of {shown(name)} at byte {place.start} is not what {METADATA} says.")
  return np.asarray(tensor)
