"""Reading and writing safetensors files: one file, or the shards named by an index. Both one tensor at a time.

A file is eight bytes (the length of the header, little-endian), a JSON header (type, shape and place of each tensor),
and the values of the tensors, one after the other.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from vit_jax.weights.errors import WeightsError, reading, shown
from vit_jax.weights.lazy import LazyTensor, map_file
from vit_jax.weights.texts import check_no_pointer, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
MAX_SHARD_SIZE = 5 * 10**9  # bytes of a file, as transformers chooses

_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_MOST_HEADER = 32 * 2**20  # bytes: of a tensor it takes about 100


def open_safetensors(path: pathlib.Path | str) -> dict[str, LazyTensor]:
  """The tensors of a safetensors file, or of a folder with `model.safetensors` or its sharded form; none is read yet.

  Raises:
    WeightsError: if a file is damaged, or a shard is missing or holds other tensors than the index says;
      FileNotFoundError: if there is no file.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    return _open(path)
  if (path / SINGLE).exists():
    return _open(path / SINGLE)
  if not (path / INDEX).exists():
    raise FileNotFoundError(f"{path} has neither {SINGLE} nor {INDEX}.")
  return open_shards(path / INDEX, _open)


def read_safetensors(path: pathlib.Path | str) -> dict[str, np.ndarray]:
  """All tensors at once of what `open_safetensors` opens."""
  return {name: np.array(tensor) for name, tensor in open_safetensors(path).items()}


def read_metadata(path: pathlib.Path | str) -> dict[str, str]:
  """The free texts in the header of a safetensors file."""
  return _header(pathlib.Path(path))[0].get("__metadata__", {})


def write_safetensors(
  path: pathlib.Path | str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
  """Writes tensors (arrays or lazy ones, one in memory at a time) in the form that `transformers` and `torch` read.

  Raises:
    WeightsError: for a tensor of a type that the format does not hold.
  """
  names = {dtype: name for name, dtype in _DTYPES.items()}
  ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # each at a multiple of its size
  header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
  end = 0
  for name in ordered:
    tensor = tensors[name]
    if tensor.dtype not in names:
      raise WeightsError(f"{name} is {tensor.dtype}, which a safetensors file cannot hold.")
    start, end = end, end + tensor.nbytes
    header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
      file.write(np.ascontiguousarray(tensors[name]).tobytes())


def write_sharded(folder: pathlib.Path, tensors: Mapping[str, Any], max_shard_size: int = MAX_SHARD_SIZE) -> None:
  """Writes tensors to `model.safetensors`, or where that would be larger, to several files and an index of them.

  Args:
    folder: an existing folder.
    tensors: arrays, or lazy ones, one in memory at a time.
    max_shard_size: bytes of the tensors of one file; a single larger tensor has a file of its own.
  """
  shards = _divide(tensors, max_shard_size)
  if len(shards) == 1:
    write_safetensors(folder / SINGLE, tensors)
    return
  files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
  for file, names in zip(files, shards, strict=True):
    write_safetensors(folder / file, {name: tensors[name] for name in names})
  total = sum(tensor.nbytes for tensor in tensors.values())
  places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
  index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _divide(tensors: Mapping[str, Any], limit: int) -> list[list[str]]:
  """The names, in order, in groups of at most `limit` bytes."""
  if limit < 1:
    raise WeightsError(f"max_shard_size={limit}: must be a number of bytes, at least 1.")
  groups: list[list[str]] = [[]]
  filled = 0
  for name, tensor in tensors.items():
    if groups[-1] and filled + tensor.nbytes > limit:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += tensor.nbytes
  return groups


def open_shards(
  index: pathlib.Path, open_file: Callable[[pathlib.Path], Mapping[str, Any]], *, strict: bool = True
) -> dict[str, Any]:
  """The tensors of the files that an index names, beside it.

  Args:
    index: a JSON file whose `weight_map` says in which file each tensor is.
    open_file: opens one of the files.
    strict: refuse files that hold more than the index says.

  Raises:
    WeightsError: if the index and the files disagree.
  """
  folder, places = index.parent, _weight_map(index)
  files = sorted(set(places.values()))
  absent = [file for file in files if not (folder / file).exists()]
  if absent:
    raise WeightsError(f"{folder} lacks {len(absent)} of the {len(files)} files of its index: {', '.join(absent)}.")
  found = {file: open_file(folder / file) for file in files}
  lost = [f"{shown(name)} (in {file})" for name, file in places.items() if name not in found[file]]
  if strict:
    more = [(file, name) for file in files for name in found[file] if name not in places]
    lost += [f"{shown(name)} of {file} (not in the index)" for file, name in more]
  if lost:
    raise WeightsError(f"{index} and its files disagree: " + "; ".join(sorted(lost)) + ".")
  return {name: found[file][name] for name, file in places.items()}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  """Which file each tensor is in; all of them files of the same folder."""
  try:
    places = dict(read_json(index)["weight_map"])
    outside = [file for file in places.values() if pathlib.PurePath(file).name != file or file in ("", "..")]
  except (WeightsError, KeyError, TypeError, ValueError) as error:
    if "LFS" in str(error):
      raise
    raise WeightsError(f"{index} is not an index of shards: {shown(repr(error))}.") from error
  if outside:
    raise WeightsError(f"{index} is not an index of shards: {shown(outside[0])} is not a file beside it.")
  return places


def _open(path: pathlib.Path) -> dict[str, LazyTensor]:
  header, start = _header(path)
  return {name: _tensor(path, name, entry, start) for name, entry in _tensors(header)}


def _tensors(header: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
  return ((name, entry) for name, entry in header.items() if name != "__metadata__")


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
  """The header of a file, which the safetensors library has found in order, and where the values begin."""
  if not path.exists():
    raise FileNotFoundError(f"there is no file {path}.")
  check_no_pointer(path)
  with reading(path), path.open("rb") as file:
    if int.from_bytes(file.read(8), "little") > max(_MOST_HEADER, path.stat().st_size // 64):
      raise WeightsError(f"{path} is not a readable safetensors file, or it is cut short: its header is too long.")
  try:
    with safetensors.safe_open(os.fspath(path), framework="numpy"):
      pass
  except safetensors.SafetensorError as error:
    raise WeightsError(f"{path} is not a readable safetensors file, or it is cut short: {error}.") from error
  with reading(path), path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length)), 8 + length


def _tensor(path: pathlib.Path, name: str, entry: Mapping[str, Any], start: int) -> LazyTensor:
  if entry["dtype"] not in _DTYPES:
    raise WeightsError(f"{path} holds {shown(name)} as {entry['dtype']}, which is not read; {', '.join(_DTYPES)} are.")
  dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
  place, size = start + entry["data_offsets"][0], math.prod(shape)

  def read() -> np.ndarray:
    with reading(path):
      return map_file(path, dtype, place, size).reshape(shape)

  return LazyTensor(shape, dtype, read)
