"""Pickles as torch.save makes them, and as nobody should, put together by hand: without torch, opcode by opcode."""

from __future__ import annotations

import pathlib
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "float64": "DoubleStorage", "int64": "LongStorage"}


class Raw(bytes):
  """Opcodes that leave one value on the stack."""


class Tensor:
  """A tensor as torch pickles it; what is not given is that of a whole, contiguous one."""

  def __init__(self, values: np.ndarray, *, shape: Sequence[int] | None = None, stride: Sequence[int] | None = None,
               key: str | None = None):  # fmt: skip
    self.values, self.key = values, key
    self.shape = values.shape if shape is None else tuple(shape)
    whole = [int(np.prod(values.shape[i + 1 :])) for i in range(values.ndim)]
    self.stride = tuple(whole if stride is None else stride)


def name(module: str, function: str) -> Raw:
  return Raw(f"c{module}\n{function}\n".encode())


def call(function: Raw, *arguments: Any) -> Raw:
  return Raw(function + b"(" + b"".join(map(pickled, arguments)) + b"tR")


def made(kind: Raw, state: Any = None) -> Raw:
  """An object of a class, with a state."""
  return Raw(kind + b")\x81" + (b"" if state is None else pickled(state) + b"b"))


def pickled(value: Any) -> bytes:
  """The opcodes of a value, tensors as references to storages."""
  if isinstance(value, Raw):
    return bytes(value)
  if value is None or isinstance(value, bool):
    return {None: b"N", True: b"\x88", False: b"\x89"}[value]
  if isinstance(value, int):
    size = value.bit_length() // 8 + 1
    return b"\x8b" + struct.pack("<i", size) + value.to_bytes(size, "little", signed=True)
  if isinstance(value, float):
    return b"G" + struct.pack(">d", value)
  if isinstance(value, str):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
  if isinstance(value, tuple):
    return b"(" + b"".join(map(pickled, value)) + b"t"
  if isinstance(value, list):
    return b"](" + b"".join(map(pickled, value)) + b"e"
  if isinstance(value, Mapping):
    return b"}(" + b"".join(pickled(key) + pickled(inner) for key, inner in value.items()) + b"u"
  storage = name("torch", STORAGES[str(value.values.dtype)])
  reference = Raw(pickled(("storage", storage, value.key or str(id(value)), "cpu", value.values.size)) + b"Q")
  rebuild = name("torch._utils", "_rebuild_tensor_v2")
  hooks = call(name("collections", "OrderedDict"))
  return call(rebuild, reference, 0, value.shape, value.stride, False, hooks)


def tensors_in(value: Any) -> dict[str, np.ndarray]:
  """The storages that a value refers to."""
  if isinstance(value, Tensor):
    return {value.key or str(id(value)): value.values}
  inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
  return {key: values for part in inner for key, values in tensors_in(part).items()}


def save(path: pathlib.Path, content: Any, *, compression: int = zipfile.ZIP_STORED) -> pathlib.Path:
  """Writes what torch.save would."""
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02" + pickled(content) + b".")
    archive.writestr("archive/byteorder", "little")
    for key, values in tensors_in(content).items():
      archive.writestr(f"archive/data/{key}", values.tobytes())
    archive.writestr("archive/version", "3\n")
  return path


def save_old(path: pathlib.Path, content: Any) -> pathlib.Path:
  """Writes what torch before 1.6 would."""
  storages = tensors_in(content)
  machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
  with path.open("wb") as file:
    file.write(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.")
    for value in (1001, machine, content, list(storages)):
      file.write(b"\x80\x02" + pickled(value) + b".")
    for values in storages.values():
      file.write(struct.pack("<q", values.size) + values.tobytes())
  return path


def save_distributed(folder: pathlib.Path, tensors: Mapping[str, np.ndarray], *, rows: int = 3, **fields: Any) -> None:
  """Writes what torch.distributed.checkpoint would: each tensor in pieces of so many rows, turn about in two files.

  Args:
    folder: a new folder.
    tensors: by name.
    rows: rows of a piece.
    **fields: of every entry that says where a piece is, in place of the right ones.
  """
  checkpoint = "torch.distributed.checkpoint"
  size = lambda shape: call(name("torch", "Size"), tuple(shape))  # noqa: E731
  folder.mkdir()
  parts, places, ends = {}, [], [0, 0]
  for path, values in tensors.items():
    chunks = []
    for number, start in enumerate(range(0, len(values), rows)):
      piece, file = np.ascontiguousarray(values[start : start + rows]), number % 2
      offsets = (start,) + (0,) * (values.ndim - 1)
      kind = name(f"{checkpoint}.metadata", "ChunkStorageMetadata")
      chunks.append(made(kind, {"offsets": size(offsets), "sizes": size(piece.shape)}))
      written = save(folder / "piece", Tensor(piece, key="0")).read_bytes()
      with (folder / f"__{file}_0.distcp").open("ab") as target:
        target.write(written)
      place = {"relative_path": f"__{file}_0.distcp", "offset": ends[file], "length": len(written)}
      index = {"fqn": path, "offset": size(offsets), "index": number}
      places += [made(name(f"{checkpoint}.metadata", "MetadataIndex"), index),
                 made(name(f"{checkpoint}.filesystem", "_StorageInfo"), place | fields)]  # fmt: skip
      ends[file] += len(written)
    properties = made(name(f"{checkpoint}.metadata", "TensorProperties"), (name("torch", str(values.dtype)), 0, False))
    state = {"properties": properties, "size": size(values.shape), "chunks": chunks}
    parts[path] = made(name(f"{checkpoint}.metadata", "TensorStorageMetadata"), state)
  (folder / "piece").unlink()
  parts["iteration"] = made(name(f"{checkpoint}.metadata", "BytesStorageMetadata"))
  storage = Raw(b"}(" + b"".join(places) + b"u")
  root = made(name(f"{checkpoint}.metadata", "Metadata"), {"state_dict_metadata": parts, "storage_data": storage})
  (folder / ".metadata").write_bytes(b"\x80\x04" + root + b".")
