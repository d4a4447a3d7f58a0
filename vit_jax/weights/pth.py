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
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vit_jax.weights.errors import WeightsError

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


def read_pth(path: pathlib.Path | str) -> dict[str, Any]:
  """The content of a `.pth` file: nested dicts, lists and plain values, with tensors as numpy arrays.

  Raises:
    WeightsError: if the file is not of torch's zip format, is damaged, or holds anything but tensors and plain values.
  """
  path = pathlib.Path(path)
  if not zipfile.is_zipfile(path):
    if not path.exists():
      raise FileNotFoundError(f"there is no file {path}.")
    raise WeightsError(
      f"{path} is not a PyTorch file in the zip format (torch >= 1.6), or it is cut short. Load an older file with "
      "torch and save it again with torch.save."
    )
  with zipfile.ZipFile(path) as archive:
    records = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(records) != 1:
      raise WeightsError(f"{path} is a zip archive, but not one written by torch.save (no data.pkl).")
    root = records[0][: -len("data.pkl")]
    order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.namelist() else b"little"
    if order != b"little":
      raise WeightsError(f"{path} was written on a {order.decode()}-endian machine, which is not supported.")
    try:
      return _TensorUnpickler(archive, root).load()
    except Exception as error:  # a malformed pickle fails in any way there is
      raise WeightsError(f"{path} cannot be read: {error}.") from error


class _Storage(np.ndarray):
  """The flat content of a storage."""


class _StorageType(NamedTuple):  # immutable: a pickle may try to change what it is given
  """What stands in a pickle for one of torch's storage classes."""

  dtype: np.dtype


class _TensorUnpickler(pickle.Unpickler):
  def __init__(self, archive: zipfile.ZipFile, root: str):
    super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
    self._archive, self._root, self._read = archive, root, {}

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
    if key not in self._read:
      content = np.frombuffer(self._archive.read(f"{self._root}data/{key}"), storage_type.dtype)
      if content.size != size:
        raise pickle.UnpicklingError(f"its storage {key} has {content.size} elements instead of {size}")
      self._read[key] = content.view(_Storage)
    return self._read[key]


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
  if not isinstance(storage, _Storage) or len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
    raise pickle.UnpicklingError("it holds a malformed tensor")
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if math.prod(size) and last >= storage.size:
    raise pickle.UnpicklingError(f"it holds a tensor that reaches beyond its storage of {storage.size} elements")
  plain = storage.view(np.ndarray)[offset:]
  strides = tuple(s * plain.itemsize for s in stride)
  return np.lib.stride_tricks.as_strided(plain, tuple(size), strides, writeable=False)


def _rebuild_parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
  if not isinstance(tensor, np.ndarray):
    raise pickle.UnpicklingError("it holds a malformed parameter")
  return tensor


def write_pth(path: pathlib.Path | str, state_dict: Mapping[str, np.ndarray]) -> None:
  """Writes a flat state dict as `torch.load(path, weights_only=True)` reads it.

  Raises:
    WeightsError: for an array of a type that torch files do not hold.
  """
  names = {dtype: name for name, dtype in _STORAGES.items()}
  out, storages = io.BytesIO(), []
  out.write(b"\x80\x02" + b"}(")  # protocol 2, a dict, mark
  for name, value in state_dict.items():
    array = np.ascontiguousarray(value).reshape(np.shape(value))
    if array.dtype not in names:
      raise WeightsError(f"{name} is {array.dtype}, which a .pth file cannot hold.")
    _write_tensor(out, name, names[array.dtype], str(len(storages)), array)
    storages.append(array)
  out.write(b"u.")  # set items, stop
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("archive/data.pkl", out.getvalue())
    archive.writestr("archive/byteorder", "little")
    for key, array in enumerate(storages):
      archive.writestr(f"archive/data/{key}", array.tobytes())
    archive.writestr("archive/version", "3\n")


def _write_tensor(out: io.BytesIO, name: str, storage: str, key: str, array: np.ndarray) -> None:
  """The pickle opcodes of `name: torch._utils._rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())`."""
  stride = tuple(step // array.itemsize for step in array.strides)
  out.write(_text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(")
  out.write(b"(" + _text("storage") + f"ctorch\n{storage}\n".encode() + _text(key) + _text("cpu"))
  out.write(_integer(array.size) + b"tQ" + _integer(0))  # the storage's tuple as persistent id; the offset
  out.write(_integers(array.shape) + _integers(stride))
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
