"""`parquet:/glob`: tables of encoded images, as the datasets of Hugging Face are stored (needs pyarrow).

The image is a column of bytes, or of {bytes, path}; the label one of integers, whose class names are in the table's
metadata, or of names. A row cannot be read alone, only its whole row group. So the row groups that were used last are
kept, up to a limit of memory, and records are shuffled within a window of some row groups at a time, those in a new
order in each epoch: a row group is read about once an epoch (`order.py`). `window_mb` and `cache_mb` say how large.
"""

from __future__ import annotations

import collections
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.data import storage
from vit_jax.data.decode import BadImage
from vit_jax.data.limits import DEFAULT
from vit_jax.data.sources import split_options

_MB = 1 << 20
_THREADS = 16
_OPTIONS = {"image": "the column of images", "label": "the column of labels", "window_mb": "256", "cache_mb": "512"}


class ParquetSource:
  """The rows of some Parquet files, in the order of the files' names.

  Attributes:
    blocks: int64 [groups + 1], the first record of each row group, and the number of records.
    window: row groups whose records are shuffled together.
  """

  def __init__(
    self, files: list[str], groups: np.ndarray, columns: tuple[str, str | None], names: list[str], cache: int
  ):
    """`groups`: int64 [groups, 4]: file, number in the file, rows, bytes. `cache`: bytes to keep."""
    self._arguments = (files, groups, columns, names, cache)
    self._files, self._groups, self._columns = files, groups, columns
    self._numbers = {name: i for i, name in enumerate(names)}
    self._cache_bytes = cache
    self._cache: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._lock = threading.Lock()
    self.blocks = np.concatenate([[0], np.cumsum(groups[:, 2])]).astype(np.int64)
    self.window = 1
    self.class_names = tuple(names)
    self.num_classes = len(names)
    self.remote = storage.is_remote(files[0])
    self.limits = DEFAULT

  def __reduce__(self):
    return (_remade, (self._arguments, self.window, self.num_classes), {"limits": self.limits})

  def __len__(self) -> int:
    return int(self.blocks[-1])

  def __getitem__(self, index: int) -> dict[str, bytes | int]:
    group, row = self._place(index)
    table = self._group(group)
    column, label = self._columns
    image = table[column][row].as_py()
    if isinstance(image, dict):
      path = image.get("path")
      image = image.get("bytes")
      if image is None and path:  # beside the table
        folder = self._files[int(self._groups[group, 0])].rpartition("/")[0]
        place = path if path.startswith("/") or storage.is_remote(path) else f"{folder}/{path}"
        image = storage.read(place, self.limits)
    if image is None:
      raise BadImage(self.describe(index), f"the column {column!r} is empty")
    value = None if label is None else table[label][row].as_py()
    return {"image": image, "label": self._numbers.get(value, -1) if isinstance(value, str) else _number(value)}

  def describe(self, index: int) -> str:
    group, row = self._place(index)
    file, number = self._groups[group, :2]
    return f"row {row} of row group {number} of {self._files[file]}"

  def _place(self, index: int) -> tuple[int, int]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    group = int(np.searchsorted(self.blocks, index, side="right")) - 1
    return group, index - int(self.blocks[group])

  def _group(self, group: int) -> Any:
    """A row group's columns, from those that are kept or else from the file."""
    with self._lock:  # threads that want the same row group must not each read it
      if group in self._cache:
        self._cache.move_to_end(group)
        return self._cache[group]
      file, number = self._groups[group, :2]
      path = self._files[file]
      try:
        table = _parquet_file(path).read_row_group(int(number), columns=[name for name in self._columns if name])
      except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
          raise
        raise BadImage(path, f"row group {number} cannot be read ({error})") from error
      columns = {name: table.column(name).combine_chunks() for name in table.column_names}
      kept = sum(table.nbytes for table in self._tables()) + table.nbytes
      while self._cache and kept > self._cache_bytes:
        kept -= self._cache.popitem(last=False)[1].nbytes
      self._cache[group] = _Group(columns, table.nbytes)
      return self._cache[group]

  def _tables(self) -> list[_Group]:
    return list(self._cache.values())


class _Group(dict):
  """The columns of a row group by their names."""

  def __init__(self, columns: dict[str, Any], nbytes: int):
    super().__init__(columns)
    self.nbytes = nbytes


def _remade(arguments: tuple, window: int, num_classes: int) -> ParquetSource:
  source = ParquetSource(*arguments)
  source.window, source.num_classes = window, num_classes
  return source


def open_parquet(rest: str, spec: str) -> ParquetSource:
  """Opens `glob[?image=COLUMN&label=COLUMN&window_mb=256&cache_mb=512]`.

  Without the options, the image is the column "image" or "img" or else the first one of images; the label the column
  "label", "labels", "fine_label" or "class". `window_mb`: how much is shuffled together; `cache_mb`: how much a process
  keeps in memory, at least one window.

  Raises:
    ValueError: if no file matches, one is no Parquet file, they differ in their columns, or have no image.
    ImportError: if pyarrow is not installed.
  """
  _pyarrow(spec)
  pattern, options = split_options(rest)
  if unknown := sorted(set(options) - set(_OPTIONS)):
    raise ValueError(f"data.source = {spec!r}: unknown option {', '.join(unknown)}; valid: {', '.join(_OPTIONS)}.")
  files = storage.matches(pattern)
  if not files:
    raise ValueError(f"data.source = {spec!r}: no file matches {pattern}; {storage.contents(pattern)}.")

  def footer(path: str) -> tuple[Any, Any]:
    try:
      opened = _parquet_file(path)
    except (OSError, ValueError) as error:
      raise ValueError(f"data.source = {spec!r}: {path} is no whole Parquet file: {error}") from error
    return opened.schema_arrow, opened.metadata

  with ThreadPoolExecutor(_THREADS) as pool:
    footers = list(pool.map(footer, files))
  schema = footers[0][0]
  image, label = _image_column(schema, options, spec), _label_column(schema, options, spec)
  for path, (other, _) in zip(files, footers, strict=True):
    if lacking := [name for name in (image, label) if name and name not in other.names]:
      raise ValueError(f"data.source = {spec!r}: {path} has no column {lacking[0]!r}, only {', '.join(other.names)}.")
  groups = np.array(
    [
      (i, number, metadata.row_group(number).num_rows, metadata.row_group(number).total_byte_size)
      for i, (_, metadata) in enumerate(footers)
      for number in range(metadata.num_row_groups)
      if metadata.row_group(number).num_rows
    ],
    np.int64,
  ).reshape(-1, 4)
  if not len(groups):
    raise ValueError(f"data.source = {spec!r}: the {len(files)} matching files hold no row.")
  window, cache = (_megabytes(options, key, spec) for key in ("window_mb", "cache_mb"))
  names, number = _class_names(files, schema, label)
  source = ParquetSource(files, groups, (image, label), names, max(cache, window) * _MB)
  source.num_classes = number
  source.window = max(1, int(window * _MB / groups[:, 3].max()))
  return source


def _megabytes(options: dict[str, str], key: str, spec: str) -> int:
  text = options.get(key, _OPTIONS[key])
  if not text.isdecimal() or int(text) < 1:
    raise ValueError(f"data.source = {spec!r}: {key}={text} must be a whole number of megabytes, at least 1.")
  return int(text)


def _image_column(schema: Any, options: dict[str, str], spec: str) -> str:
  import pyarrow.types as kinds

  def holds_images(kind: Any) -> bool:
    if kinds.is_struct(kind):
      return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
    return kinds.is_binary(kind) or kinds.is_large_binary(kind)

  found = [field.name for field in schema if holds_images(field.type)]
  listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
  if "image" in options:
    if options["image"] not in found:
      raise ValueError(f"data.source = {spec!r}: {options['image']!r} is no column of images; the columns: {listed}.")
    return options["image"]
  if not found:
    raise ValueError(f"data.source = {spec!r} has no column of bytes or of {{bytes, path}}; the columns: {listed}.")
  return next((name for name in ("image", "img") if name in found), found[0])


def _label_column(schema: Any, options: dict[str, str], spec: str) -> str | None:
  if "label" in options:
    if options["label"] not in schema.names:
      raise ValueError(
        f"data.source = {spec!r}: there is no column {options['label']!r}; the columns: {', '.join(schema.names)}."
      )
    return options["label"]
  return next((name for name in ("label", "labels", "fine_label", "class") if name in schema.names), None)


def _class_names(files: list[str], schema: Any, label: str | None) -> tuple[list[str], int]:
  """(class names, number of classes): from the metadata of Hugging Face, else from all the labels."""
  import pyarrow.types as kinds

  if label is None:
    return [], 0
  described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
  names = described.get("info", {}).get("features", {}).get(label, {}).get("names")
  if names:
    return list(names), len(names)
  kind = schema.field(label).type
  if kinds.is_dictionary(kind):
    kind = kind.value_type
  if kinds.is_integer(kind):
    greatest = -1
    for file in files:
      values = _parquet_file(file).read(columns=[label]).column(label)
      numbers = [value for value in values.unique().to_pylist() if value is not None]
      greatest = max([greatest, *numbers])
    return [], greatest + 1
  if kinds.is_string(kind) or kinds.is_large_string(kind):
    found: set[str] = set()
    for file in files:
      found |= set(_parquet_file(file).read(columns=[label]).column(label).unique().to_pylist())
    names = sorted(found - {None})
    return names, len(names)
  return [], 0  # a list of labels, a box, …: no class


def _number(value: Any) -> int:
  return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _parquet_file(path: str) -> Any:
  import pyarrow.parquet as pq

  if storage.is_remote(path):
    return pq.ParquetFile(storage.open_file(path), pre_buffer=True)
  return pq.ParquetFile(path, memory_map=False)


def _pyarrow(spec: str) -> None:
  try:
    import pyarrow.parquet  # noqa: F401
  except ImportError as error:
    raise ImportError(f'data.source = {spec!r} needs the package pyarrow: pip install "vit-jax[parquet]"') from error
