"""PyTorch's `.pth` files without PyTorch: read with an unpickler that can build tensors and nothing else, and written.

A file is a zip archive: `<name>/data.pkl` is a pickle of nested containers whose tensors refer to storages, each the
raw bytes of `<name>/data/<key>`.
"""

from __future__ import annotations

import collections
import io
import math
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vit_jax.weights.errors import WeightsError
from vit_jax.weights.files import check_no_pointer
from vit_jax.weights.lazy import LazyTensor, map_file

_STORAGES = {
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}
_PIECE = 1 << 17  # bytes that are checked at a time


def open_pth(path: pathlib.Path | str) -> dict[str, Any]:
  """The content of a `.pth` file: nested dicts, lists and plain values, with lazy tensors.

  A tensor that is read is checked first (against the checksum of its storage).

  Raises:
    WeightsError: if the file is not of torch's zip format, is damaged, or holds anything but tensors and plain values.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"there is no file {path}.")
  check_no_pointer(path)
  if not zipfile.is_zipfile(path):
    raise WeightsError(
      f"{path} is not a PyTorch file in the zip format (torch >= 1.6), or it is cut short. Load an older file with "
      "torch and save it again with torch.save."
    )
  with zipfile.ZipFile(path) as archive:
    root = _root(archive, path)
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.namelist() else b"little"
    if order != b"little":
      raise WeightsError(f"{path} was written on a {order.decode()}-endian machine, which is not supported.")
    try:
      content = _TensorUnpickler(path, archive, root).load()
    except Exception as error:  # a malformed pickle fails in any way there is
      raise WeightsError(f"{path} cannot be read: {error}.") from error
  if not isinstance(content, Mapping):
    raise WeightsError(f"{path} holds a {type(content).__name__}, not a dict of tensors (a state dict).")
  return dict(content)


def read_pth(path: pathlib.Path | str) -> dict[str, Any]:
  """What `open_pth` opens, with all tensors as arrays."""
  return _loaded(open_pth(path))


def read_extra(path: pathlib.Path | str, name: str) -> str | None:
  """The text `extra/name` of a `.pth` file, which torch passes over; None: there is none."""
  with zipfile.ZipFile(path) as archive:
    record = f"{_root(archive, pathlib.Path(path))}extra/{name}"
    return archive.read(record).decode() if record in archive.namelist() else None


def _root(archive: zipfile.ZipFile, path: pathlib.Path) -> str:
  """What the names of all records begin with."""
  records = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
  if len(records) != 1:
    raise WeightsError(f"{path} is a zip archive, but not one written by torch.save (no data.pkl).")
  return records[0][: -len("data.pkl")]


def _loaded(value: Any) -> Any:
  if isinstance(value, LazyTensor):
    return np.array(value)
  if isinstance(value, Mapping):
    return {key: _loaded(inner) for key, inner in value.items()}
  return type(value)(map(_loaded, value)) if type(value) in (list, tuple) else value


class _Storage(NamedTuple):  # immutable: a pickle may try to change what it is given
  """The flat content of a storage; `read` maps it, and checks it when it is first asked to."""

  read: Callable[[], np.ndarray]
  dtype: np.dtype
  size: int


class _StorageType(NamedTuple):
  """What stands in a pickle for one of torch's storage classes."""

  dtype: np.dtype


class _TensorUnpickler(pickle.Unpickler):
  def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile, root: str):
    super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
    self._path, self._archive, self._root, self._storages = path, archive, root, {}

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in _STORAGES:
      return _StorageType(_STORAGES[name])
    allowed = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
      ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
      ("torch", "Size"): tuple,
    }
    if (module, name) not in allowed:
      raise pickle.UnpicklingError(
        f"it contains {module}.{name}; only tensors and plain containers are loaded, because a pickle can run any "
        "code. If you trust the file, load it with torch and save its state dict alone"
      )
    return allowed[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    kind, storage_type, key, _, size = pid
    if kind != "storage" or not isinstance(storage_type, _StorageType):
      raise pickle.UnpicklingError(f"it refers to {pid!r}, which is not a storage")
    if key not in self._storages:
      record, dtype = self._archive.getinfo(f"{self._root}data/{key}"), storage_type.dtype
      if record.file_size != size * dtype.itemsize:
        raise pickle.UnpicklingError(
          f"its storage {key} has {record.file_size / dtype.itemsize:g} elements instead of {size}"
        )
      self._storages[key] = _Storage(_reader(self._path, record, dtype), dtype, size)
    return self._storages[key]


def _reader(path: pathlib.Path, record: zipfile.ZipInfo, dtype: np.dtype) -> Callable[[], np.ndarray]:
  """Reads a record of the archive as a flat array: a view of the file, if the record is not compressed."""
  start: int | None = None

  def read() -> np.ndarray:
    nonlocal start
    try:
      if record.compress_type != zipfile.ZIP_STORED:
        with zipfile.ZipFile(path) as archive:
          return np.frombuffer(archive.read(record), dtype)
      start = _checked(path, record) if start is None else start
    except (zipfile.BadZipFile, EOFError, OSError) as error:
      raise WeightsError(f"{path} cannot be read: {error}.") from error
    return map_file(path, dtype, start, record.file_size // dtype.itemsize)

  return read


def _checked(path: pathlib.Path, record: zipfile.ZipInfo) -> int:
  """Where the content of a record begins, after its checksum was compared."""
  with zipfile.ZipFile(path) as archive, archive.open(record) as content:
    while content.read(_PIECE):  # at the end of which it is compared
      pass
  with path.open("rb") as file:
    file.seek(record.header_offset)
    name, extra = struct.unpack("<26x2H", file.read(30))  # lengths of what is between the local header and the content
  return record.header_offset + 30 + name + extra


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> LazyTensor:
  if not isinstance(storage, _Storage) or len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
    raise pickle.UnpicklingError("it holds a malformed tensor")
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if math.prod(size) and last >= storage.size:
    raise pickle.UnpicklingError(f"it holds a tensor that reaches beyond its storage of {storage.size} elements")
  strides = tuple(s * storage.dtype.itemsize for s in stride)

  def read() -> np.ndarray:
    return np.lib.stride_tricks.as_strided(storage.read()[offset:], tuple(size), strides, writeable=False)

  return LazyTensor(tuple(size), storage.dtype, read)


def _rebuild_parameter(tensor: LazyTensor, *_: Any) -> LazyTensor:
  if not isinstance(tensor, LazyTensor):
    raise pickle.UnpicklingError("it holds a malformed parameter")
  return tensor


def write_pth(path: pathlib.Path | str, state_dict: Mapping[str, Any], extra: Mapping[str, str] | None = None) -> None:
  """Writes a flat state dict (arrays or lazy tensors, one in memory at a time) as `torch.load` reads it.

  Args:
    path: the file.
    state_dict: names → tensors.
    extra: names → texts that torch passes over; see `read_extra`.

  Raises:
    WeightsError: for an array of a type that torch files do not hold.
  """
  names = {dtype: name for name, dtype in _STORAGES.items()}
  out = io.BytesIO()
  out.write(b"\x80\x02" + b"}(")  # protocol 2, a dict, mark
  for key, (name, tensor) in enumerate(state_dict.items()):
    if tensor.dtype not in names:
      raise WeightsError(f"{name} is {tensor.dtype}, which a .pth file cannot hold.")
    _write_tensor(out, name, names[tensor.dtype], str(key), tensor.shape)
  out.write(b"u.")  # set items, stop
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("archive/data.pkl", out.getvalue())
    archive.writestr("archive/byteorder", "little")
    for key, tensor in enumerate(state_dict.values()):
      archive.writestr(f"archive/data/{key}", np.ascontiguousarray(tensor).tobytes())
    archive.writestr("archive/version", "3\n")
    for name, text in (extra or {}).items():
      archive.writestr(f"archive/extra/{name}", text)


def _write_tensor(out: io.BytesIO, name: str, storage: str, key: str, shape: tuple[int, ...]) -> None:
  """The pickle opcodes of `name: torch._utils._rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())`."""
  stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
  out.write(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(")
  out.write(b"(" + _text("storage") + f"ctorch\n{storage}\n".encode() + _text(key) + _text("cpu"))
  out.write(_integer(math.prod(shape)) + b"tQ" + _integer(0))  # the storage's tuple as persistent id; the offset
  out.write(_integers(shape) + _integers(stride))
  out.write(b"\x89" + b"ccollections\nOrderedDict\n)R" + b"tR")  # False, OrderedDict(); call


def _text(value: str) -> bytes:
  encoded = value.encode()
  return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
  if value < 2**31:
    return b"J" + struct.pack("<i", value)
  return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: tuple[int, ...]) -> bytes:
  return b"(" + b"".join(_integer(value) for value in values) + b"t"
