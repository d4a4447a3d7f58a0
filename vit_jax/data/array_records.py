"""`array_record:/glob`: ArrayRecord shards.

A record is either an encoded image as it is (no label), or this package's own form, which `write_array_record` makes:

    4 bytes   b"VJR1"; b"VJR2" if the label does not fit into 4 bytes
    4 bytes   label, signed, little-endian; -1: none (VJR2: 8 bytes)
    2 bytes   length of the name, unsigned, little-endian
    …         name, UTF-8: what to call the image in a message
    …         the encoded image

`classes.json` beside the shards, if there, is the list of class names; without it the labels themselves are the names.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vit_jax.data import hints, storage
from vit_jax.data.classes import CLASSES, Classes, class_names
from vit_jax.data.decode import BadImage
from vit_jax.data.left_out import LeftOut, in_a_line, printable
from vit_jax.data.limits import DEFAULT
from vit_jax.data.record_labels import classes_of_records

_HEADERS = {b"VJR1": struct.Struct("<4siH"), b"VJR2": struct.Struct("<4sqH")}  # by their beginning


class ArrayRecords:
  """The records of some ArrayRecord files, in the order of the files' names, as they are stored."""

  def __init__(self, paths: list[str]):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    self._records = ArrayRecordDataSource(paths)

  def __len__(self) -> int:
    return len(self._records)

  def read(self, index: int) -> tuple[int, str, bytes]:
    """(label, name, encoded image) of a record.

    Raises:
      BadImage: if it cannot be read.
    """
    try:
      record = self._records[index]
    except (RuntimeError, ValueError) as error:  # a damaged chunk of the file
      raise BadImage(f"record {index}", f"cannot be read ({in_a_line(error)})") from error
    header = _HEADERS.get(record[:4])
    if header is None:
      return -1, "", record
    if len(record) < header.size:
      raise BadImage(f"record {index}", "ends inside its header")
    _, label, length = header.unpack_from(record)
    start = header.size + length
    return label, record[header.size : start].decode("utf-8", "replace"), record[start:]


class ArrayRecordSource:
  """The images of some ArrayRecord files and their classes."""

  def __init__(self, paths: list[str], classes: Classes, left_out: LeftOut):
    self._paths, self._classes, self.left_out = paths, classes, left_out
    self._records = ArrayRecords(paths)
    self.class_names = classes.names
    self.num_classes = len(classes.names)
    self.limits = DEFAULT

  def __reduce__(self):  # a worker process opens the files for itself
    return (ArrayRecordSource, (self._paths, self._classes, self.left_out), {"limits": self.limits})

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, bytes | int]:
    label, _, image = self._records.read(index)
    return {"image": image, "label": self._classes.number(label)}

  def describe(self, index: int) -> str:
    where = self._paths[0] if len(self._paths) == 1 else f"{len(self._paths)} files from {self._paths[0]}"
    try:
      name = self._records.read(index)[1]
    except BadImage:
      name = ""
    return printable(f"record {index} of {where}" + (f" ({name})" if name else ""))


def open_array_record(
  pattern: str, spec: str, *, cache_dir: str | os.PathLike | None = None
) -> ArrayRecordSource:
  """Opens the shards that match a pattern, or those of a folder, *.array_record.

  Args:
    pattern: of the shards' paths.
    spec: the specification that it comes from, for messages.
    cache_dir: where the labels of large sets without a list of class names are kept.

  Raises:
    ValueError: if no file matches, a file is no ArrayRecord file, or they hold no record.
  """
  if storage.is_remote(pattern):
    raise ValueError(f"data.source = {spec!r}: ArrayRecord shards are read from disks only; copy them to one.")
  if os.path.isdir(os.path.expanduser(pattern)):
    pattern = os.path.join(pattern, "*.array_record")
  left_out = LeftOut()
  paths = storage.matches(pattern, left_out)
  if not paths:
    found = f"{storage.contents(pattern)}.{hints.no_match(pattern)}"
    raise ValueError(f"data.source = {spec!r}: no file matches {pattern}; {found}")
  try:
    records = ArrayRecords(paths)
    size = len(records)
  except (RuntimeError, ValueError) as error:
    broken = [path for path in paths if not _is_whole(path)]
    first = f", the first of them {broken[0]}" if broken else ""
    raise ValueError(
      f"data.source = {spec!r}: not all of {len(paths)} files are whole ArrayRecord files{first} "
      f"({in_a_line(error)}); write them again, or give a pattern that leaves them out, such as FOLDER/*.array_record."
    ) from error
  if size == 0:
    raise ValueError(f"data.source = {spec!r}: the {len(paths)} matching files hold no record.")
  names = class_names(str(Path(paths[0]).with_name(CLASSES)))
  classes, others = classes_of_records(
    lambda index: records.read(index)[0], size, paths, names=names, cache_dir=cache_dir
  )
  left_out.merge(others)
  return ArrayRecordSource(paths, classes, left_out)


def _is_whole(path: str) -> bool:
  try:
    return len(ArrayRecords([path])) >= 0
  except (RuntimeError, ValueError):
    return False


def write_array_record(
  path: str | os.PathLike,
  records: Iterable[tuple[bytes, int, str]],
  class_names: Iterable[str] = (),
) -> int:
  """Writes one shard from (encoded image, label, name) and, with `class_names`, classes.json beside it.

  Returns:
    The number of records written.

  Raises:
    ValueError: for a label that does not fit into 8 bytes.
  """
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(path), "group_size:1")  # one record a chunk: random access reads no neighbours
  count = 0
  for image, label, name in records:
    encoded = name.encode("utf-8", "backslashreplace")[: np.iinfo(np.uint16).max]
    writer.write(_header(label, len(encoded)) + encoded + image)
    count += 1
  writer.close()
  names = list(class_names)
  if names:
    Path(path).with_name(CLASSES).write_text(json.dumps(names))
  return count


def _header(label: int, length: int) -> bytes:
  for beginning, header in _HEADERS.items():
    try:
      return header.pack(beginning, label, length)
    except struct.error:
      continue
  raise ValueError(f"the label {label} does not fit into 8 bytes: number the classes, and give their names.")
