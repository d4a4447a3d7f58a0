"""`array_record:/glob`: ArrayRecord shards.

A record is either an encoded image as it is (no label), or this package's own form, which `write_array_record` makes:

    4 bytes   b"VJR1"
    4 bytes   label, signed, little-endian; -1: none
    2 bytes   length of the name, unsigned, little-endian
    …         name, UTF-8: what to call the image in a message
    …         the encoded image

`classes.json` beside the shards, if there, is the list of class names.
"""

from __future__ import annotations

import glob
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vit_jax.data.decode import BadImage
from vit_jax.data.limits import DEFAULT

_MAGIC = b"VJR1"
_HEADER = struct.Struct("<4siH")
CLASSES = "classes.json"


class ArrayRecordSource:
  """The records of some ArrayRecord files, in the order of the files' names."""

  def __init__(self, paths: list[str], class_names: tuple[str, ...]):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    self._paths = paths
    self._records = ArrayRecordDataSource(paths)
    self.class_names = class_names
    self.num_classes = len(class_names)
    self.limits = DEFAULT

  def __reduce__(self):
    limits = {"limits": self.limits}
    return (ArrayRecordSource, (self._paths, self.class_names), limits)  # a worker process opens the files for itself

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, bytes | int]:
    label, _, image = self._read(index)
    return {"image": image, "label": label}

  def describe(self, index: int) -> str:
    where = self._paths[0] if len(self._paths) == 1 else f"{len(self._paths)} files from {self._paths[0]}"
    try:
      name = self._read(index)[1]
    except BadImage:
      name = ""
    return f"record {index} of {where}" + (f" ({name})" if name else "")

  def _read(self, index: int) -> tuple[int, str, bytes]:
    try:
      record = self._records[index]
    except (RuntimeError, ValueError) as error:  # a damaged chunk of the file
      raise BadImage(f"record {index}", f"cannot be read ({error})") from error
    if not record.startswith(_MAGIC):
      return -1, "", record
    if len(record) < _HEADER.size:
      raise BadImage(f"record {index}", "ends inside its header")
    _, label, length = _HEADER.unpack_from(record)
    start = _HEADER.size + length
    return label, record[_HEADER.size : start].decode("utf-8", "replace"), record[start:]


def open_array_record(pattern: str, spec: str) -> ArrayRecordSource:
  """Opens the shards that match a pattern, or those of a folder, *.array_record.

  Raises:
    ValueError: if no file matches, a file is no ArrayRecord file, or they hold no record.
  """
  if os.path.isdir(os.path.expanduser(pattern)):
    pattern = os.path.join(pattern, "*.array_record")
  paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
  if not paths:
    folder = Path(pattern).expanduser().parent
    found = sorted(os.listdir(folder))[:8] if folder.is_dir() else None
    where = f"{folder} holds {', '.join(found) or 'nothing'}" if found is not None else f"there is no folder {folder}"
    raise ValueError(f"data.source = {spec!r}: no file matches {pattern}; {where}.")
  try:
    source = ArrayRecordSource(paths, _class_names(Path(paths[0]).with_name(CLASSES)))
    size = len(source)
  except (RuntimeError, ValueError) as error:
    broken = [path for path in paths if not _is_whole(path)]
    first = f", the first of them {broken[0]}" if broken else ""
    raise ValueError(
      f"data.source = {spec!r}: not all of {len(paths)} files are whole ArrayRecord files{first} ({error}); write them "
      "again, or give a pattern that leaves them out, such as FOLDER/*.array_record."
    ) from error
  if size == 0:
    raise ValueError(f"data.source = {spec!r}: the {len(paths)} matching files hold no record.")
  return source


def _is_whole(path: str) -> bool:
  try:
    return len(ArrayRecordSource([path], ())) >= 0
  except (RuntimeError, ValueError):
    return False


def _class_names(path: Path) -> tuple[str, ...]:
  return tuple(json.loads(path.read_text())) if path.exists() else ()


def write_array_record(
  path: str | os.PathLike,
  records: Iterable[tuple[bytes, int, str]],
  class_names: Iterable[str] = (),
) -> int:
  """Writes one shard from (encoded image, label, name) and, with `class_names`, classes.json beside it.

  Returns:
    The number of records written.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(path), "group_size:1")  # one record a chunk: random access reads no neighbours
  count = 0
  for image, label, name in records:
    encoded = name.encode()[: np.iinfo(np.uint16).max]
    writer.write(_HEADER.pack(_MAGIC, label, len(encoded)) + encoded + image)
    count += 1
  writer.close()
  names = list(class_names)
  if names:
    Path(path).with_name(CLASSES).write_text(json.dumps(names))
  return count
