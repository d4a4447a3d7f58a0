"""Files of PyTorch without PyTorch: read with an interpreter of pickles that runs nothing, and written.

A file of torch since 1.6 is a zip archive: `<name>/data.pkl` is a pickle of nested containers whose tensors refer to
storages, each the raw bytes of `<name>/data/<key>`. An older one is a sequence of pickles: a magic number, a version,
what the machine was, the content, the keys of the storages; then the storages, each a number of elements and the bytes.
"""

from __future__ import annotations

import io
import math
import mmap
import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.weights import bounds, pickles
from vit_jax.weights.archive import MAGIC, Archive
from vit_jax.weights.errors import Unreadable, WeightsError, reading
from vit_jax.weights.lazy import LazyTensor, map_file
from vit_jax.weights.pickles import Foreign
from vit_jax.weights.storages import STORAGES, Storage, builders, storage_type
from vit_jax.weights.texts import check_no_pointer

_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the magic number, pickled
_WAY_OUT = (
  "If you trust it, save what it holds with torch: "
  "torch.save(torch.load(FILE, weights_only=False, map_location='cpu'), NEW)"
)


def open_pth(path: pathlib.Path | str) -> dict[str, Any]:
  """The content of a file of torch: nested dicts, lists and plain values, with lazy tensors.

  Objects of classes that are not known (arguments of a program, scalars of numpy) are `pickles.Foreign`: no code of the
  file is run. A tensor that is read is checked first against the checksum of its storage, where the file has one.

  Raises:
    WeightsError: if the file is not torch's, is damaged, or claims more than its bytes are worth.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {path}.")
  check_no_pointer(path)
  with reading(path):
    with path.open("rb") as file:
      beginning = file.read(len(_LEGACY))
    if beginning == _LEGACY:
      content = _open_legacy(path)
    elif beginning.startswith(MAGIC):
      content = open_record(Archive(path), path)
    else:
      raise WeightsError(_what_else(path, beginning))
  if isinstance(content, Foreign) and content.items:  # a dict of a class of its own
    content = content.items
  if type(content) in (list, tuple):
    content = {str(number): part for number, part in enumerate(content)}
  if isinstance(content, Foreign) and not str(content).startswith("torch._utils."):
    raise WeightsError(
      f"{path} holds a whole pickled object ({content}), which is code besides weights. If you trust it, save its "
      "weights alone with torch: torch.save(torch.load(FILE, weights_only=False).state_dict(), NEW)."
    )
  if not isinstance(content, Mapping):
    kind = "tensor" if isinstance(content, LazyTensor) else type(content).__name__
    raise WeightsError(f"{path} holds a {kind}, not a dict of tensors (a state dict).")
  return dict(content)


def open_record(archive: Archive, path: pathlib.Path) -> Any:
  """What torch.save has put into an archive."""
  root = _root(archive, path)
  order = archive.text(f"{root}byteorder").strip() if f"{root}byteorder" in archive else "little"
  if order != "little":
    raise WeightsError(f"{path} was written on a {order}-endian machine, which is not supported.")
  storages: dict[str, Storage | Foreign] = {}

  def storage(pid: Any) -> Storage | Foreign:
    key, dtype, size = _reference(pid)
    if key not in storages:
      record = f"{root}data/{key}"
      if record not in archive:
        raise Unreadable(f"it lacks its storage {key}")
      if dtype is None:
        storages[key] = Foreign(pid[1], ())
      elif archive.size(record) != size * dtype.itemsize:
        raise Unreadable(f"its storage {key} has {archive.size(record) / dtype.itemsize:g} elements instead of {size}")
      else:
        storages[key] = Storage(archive.reader(record, dtype), dtype, size)
    return storages[key]

  with reading(path):
    most = bounds.most_operations(archive.length)
    return pickles.load(archive.bytes(f"{root}data.pkl"), builders(archive.length), storage, most=most)[0]


def read_pth(path: pathlib.Path | str) -> dict[str, Any]:
  """What `open_pth` opens, with all tensors as arrays."""
  return _loaded(open_pth(path))


def read_extra(path: pathlib.Path | str, name: str) -> str | None:
  """The text `extra/name` of a file of torch, which torch passes over; None: there is none."""
  path = pathlib.Path(path)
  if not is_zip(path):
    return None
  archive = Archive(path)
  record = f"{_root(archive, path)}extra/{name}"
  return archive.text(record) if record in archive else None


def is_torch(path: pathlib.Path) -> bool:
  """Whether a file begins as one of torch."""
  with reading(path), path.open("rb") as file:
    return file.read(len(_LEGACY)).startswith((MAGIC, _LEGACY))


def is_zip(path: pathlib.Path) -> bool:
  """Whether a file begins as an archive."""
  with reading(path), path.open("rb") as file:
    return file.read(len(MAGIC)) == MAGIC


def _what_else(path: pathlib.Path, beginning: bytes) -> str:
  """What a file is that is none of torch."""
  if beginning.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
    return f"{path} is not a PyTorch file but a web page, or it is cut short: the download failed; fetch it again."
  if beginning.startswith(b"\x80"):
    return f"{path} is not a PyTorch file but another pickle, or it is cut short. {_WAY_OUT}."
  return f"{path} is not a PyTorch file (a zip archive of torch.save, or its older form), or it is cut short."


def _root(archive: Archive, path: pathlib.Path) -> str:
  """What the names of all records begin with."""
  records = [name for name in archive if name.endswith("/data.pkl") or name == "data.pkl"]
  if len(records) != 1:
    raise WeightsError(f"{path} is a zip archive, but not one written by torch.save (no data.pkl).")
  return records[0][: -len("data.pkl")]


def _reference(pid: Any) -> tuple[str, np.dtype | None, int]:
  """Key, type (None: not read) and number of elements of the storage that a pickle refers to."""
  if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
    raise Unreadable("it refers to what is no storage")
  _, kind, key, _, size, *view = pid
  if type(key) is not str or type(size) is not int or not 0 <= size < 2**48 or any(part is not None for part in view):
    raise Unreadable("it refers to what is no storage")
  return key, storage_type(kind), size


def _open_legacy(path: pathlib.Path) -> Any:
  stored = path.stat().st_size
  with path.open("rb") as file:
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # closed with the last view of it
  return _read_legacy(path, data, stored)


def _read_legacy(path: pathlib.Path, data: memoryview, stored: int) -> Any:
  """The content of an older file; where its storages are is known at the end, and filled in."""
  most, at, values = bounds.most_operations(stored), 0, []
  places: dict[str, int] = {}
  types: dict[str, tuple[np.dtype | None, int]] = {}

  def storage(pid: Any) -> Any:
    if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":  # a class, with its source beside
      return pid[1]
    key, dtype, size = _reference(pid)
    if types.setdefault(key, (dtype, size)) != (dtype, size):
      raise Unreadable(f"its storage {key} has two types or sizes")
    if dtype is None:
      raise Unreadable(f"it has a {pid[1]}, which is not read. {_WAY_OUT}")
    return Storage(lambda: map_file(path, dtype, places[key], size), dtype, size)

  for _ in range(5):
    value, at = pickles.load(data, builders(stored), storage, start=at, most=most)
    values.append(value)
  _, version, machine, content, keys = values
  if version != 1001 or type(machine) is not dict or machine.get("little_endian") is not True:
    raise Unreadable(f"it is of a kind of file that is not read. {_WAY_OUT}")
  for key in keys:
    dtype, size = types[key]
    if key in places or int.from_bytes(data[at : at + 8], "little") != size:
      raise Unreadable(f"its storage {key} has not the {size} elements that it should have")
    places[key], at = at + 8, at + 8 + size * dtype.itemsize
  if at > stored or len(places) != len(types):
    raise Unreadable("it is cut short: storages are missing")
  return content


def _loaded(value: Any) -> Any:
  if isinstance(value, LazyTensor):
    return np.array(value)
  if isinstance(value, Mapping):
    return {key: _loaded(inner) for key, inner in value.items()}
  return type(value)(map(_loaded, value)) if type(value) in (list, tuple) else value


def write_pth(path: pathlib.Path | str, state_dict: Mapping[str, Any], extra: Mapping[str, str] | None = None) -> None:
  """Writes a flat state dict (arrays or lazy tensors, one in memory at a time) as `torch.load` reads it.

  Args:
    path: the file.
    state_dict: names → tensors.
    extra: names → texts that torch passes over; see `read_extra`.

  Raises:
    WeightsError: for an array of a type that torch files do not hold.
  """
  names = {dtype: name for name, dtype in STORAGES.items()}
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
