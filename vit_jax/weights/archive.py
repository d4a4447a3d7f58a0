"""The zip archives that torch.save writes: a file, or a part of one; records are bounded before they are read."""

from __future__ import annotations

import io
import pathlib
import struct
import zipfile
from collections.abc import Callable

import numpy as np

from vit_jax.weights import bounds
from vit_jax.weights.errors import Unreadable, WeightsError, reading, shown
from vit_jax.weights.lazy import map_file

MAGIC = b"PK\x03\x04"
_PIECE = 1 << 17  # bytes that are checked at a time
_DIRECTORY = 64 * 2**20  # bytes; of a record it takes about 100
_TEXT = 2**20  # bytes of a record of text
_END, _END_64, _PLACE_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")


class Archive:
  """The records of an archive by name.

  Args:
    path: the file.
    start: where in it the archive begins.
    length: the bytes of the archive; None: up to the end of the file.

  Raises:
    WeightsError: if it is damaged, or is made to take more memory than its bytes are worth.
  """

  def __init__(self, path: pathlib.Path, start: int = 0, length: int | None = None):
    with reading(path):
      self._path, self._start = path, start
      self.length = path.stat().st_size - start if length is None else length
      with self._open() as window:
        _check_directory(window, self.length, path)
        with zipfile.ZipFile(window) as archive:
          self._records = _checked_records(archive, self.length, path)

  def __contains__(self, name: str) -> bool:
    return name in self._records

  def __iter__(self):
    return iter(self._records)

  def text(self, name: str) -> str:
    """A short record as text."""
    with reading(self._path):
      record = self._records[name]
      if record.file_size > _TEXT:
        raise Unreadable(f"its record {shown(name)} is no text")
      return self.bytes(name).decode()

  def bytes(self, name: str) -> bytes:
    """A record, checked against its checksum."""
    record = self._records[name]
    with reading(self._path):
      bounds.check_bytes(record.file_size, self.length, f"its record {shown(name)}")
      with self._open() as window, zipfile.ZipFile(window) as archive:
        return archive.read(record)

  def size(self, name: str) -> int:
    """The bytes of a record."""
    return self._records[name].file_size

  def reader(self, name: str, dtype: np.dtype) -> Callable[[], np.ndarray]:
    """Reads a record as a flat array, checked before it is used: a view of the file, if it is not compressed."""
    record, start = self._records[name], None
    with reading(self._path):
      bounds.check_bytes(record.file_size, self.length, f"its record {shown(name)}")

    def read() -> np.ndarray:
      nonlocal start
      with reading(self._path):
        if record.compress_type != zipfile.ZIP_STORED:
          return np.frombuffer(self.bytes(name), dtype)
        start = self._checked(record) if start is None else start
        return map_file(self._path, dtype, start, record.file_size // dtype.itemsize)

    return read

  def _checked(self, record: zipfile.ZipInfo) -> int:
    """Where the content of a record begins in the file, after its checksum was compared."""
    with self._open() as window:
      with zipfile.ZipFile(window) as archive, archive.open(record) as content:
        while content.read(_PIECE):  # at the end of which it is compared
          pass
      window.seek(record.header_offset)
      name, extra = struct.unpack("<26x2H", window.read(30))  # lengths of what is between local header and content
    return self._start + record.header_offset + 30 + name + extra

  def _open(self) -> _Window:
    return _Window(self._path, self._start, self.length)


class _Window(io.RawIOBase):
  """A part of a file as a file."""

  def __init__(self, path: pathlib.Path, start: int, length: int):
    super().__init__()
    self._file, self._start, self._length, self._at = path.open("rb"), start, length, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
    if at < 0:
      raise OSError("a place before its beginning")
    self._at = at
    return at

  def read(self, size: int = -1) -> bytes:
    left = max(self._length - self._at, 0)
    self._file.seek(self._start + self._at)
    found = self._file.read(left if size is None or size < 0 else min(size, left))
    self._at += len(found)
    return found

  def readinto(self, buffer: bytearray) -> int:
    found = self.read(len(buffer))
    buffer[: len(found)] = found
    return len(found)

  def close(self) -> None:
    self._file.close()
    super().close()


def _check_directory(window: _Window, length: int, path: pathlib.Path) -> None:
  """Refuses a list of records that is longer than any of torch's: each takes several times its bytes in memory."""
  tail = min(length, _END.size + 0xFFFF)
  window.seek(length - tail)
  text = window.read(tail)
  at = text.rfind(b"PK\x05\x06")
  if at < 0 or len(text) - at < _END.size:
    raise WeightsError(f"{path} is not a PyTorch file, or it is cut short: its list of records is missing.")
  size = _END.unpack_from(text, at)[5]
  place = at - _PLACE_64.size
  if place >= 0 and text[place : place + 4] == b"PK\x06\x07":
    window.seek(max(length - tail + place - _END_64.size, 0))
    record = window.read(_END_64.size)
    size = max(size, _END_64.unpack(record)[8]) if record[:4] == b"PK\x06\x06" else size
  if size != 0xFFFFFFFF and size > _DIRECTORY:
    raise WeightsError(f"{path} has a list of records of {size} bytes, which no file of torch has.")


def _checked_records(archive: zipfile.ZipFile, length: int, path: pathlib.Path) -> dict[str, zipfile.ZipInfo]:
  """The records by name: none twice, none within another, all within the file."""
  records = sorted(archive.infolist(), key=lambda record: record.header_offset)
  ends = [record.header_offset for record in records[1:]] + [archive.start_dir]
  for record, end in zip(records, ends, strict=True):
    stored = record.compress_type == zipfile.ZIP_STORED
    if not stored and record.compress_type != zipfile.ZIP_DEFLATED:
      raise WeightsError(f"{path} is compressed in a way that is not read: save it again with torch.save.")
    if record.header_offset < 0 or record.header_offset + 30 + record.compress_size > min(end, length):
      raise WeightsError(f"{path} is damaged: its records lie within each other.")
    if stored and record.file_size != record.compress_size:
      raise WeightsError(f"{path} is damaged: a record says two sizes.")
  found = {record.filename: record for record in records}
  if len(found) != len(records):
    raise WeightsError(f"{path} is damaged: it has two records of one name.")
  return found
