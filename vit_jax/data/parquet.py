"""`parquet:/glob`: tables of encoded images, as the datasets of Hugging Face are stored (needs pyarrow).

The image is a column of bytes, or of {bytes, path}; the label one of numbers, whose class names may be in the table's
metadata, or of names (`classes.py`). Rows that name a file instead of holding an image are refused, unless with
`paths=below` those below the table's folder are asked for. A row cannot be read alone, only its whole row group. So the
row groups that were used last are kept, up to a limit of memory, and records are shuffled within a window of some row
groups at a time, those in a new order in each epoch: a row group is read about once an epoch (`order.py`). `window_mb`
and `cache_mb` say how large.
"""

from __future__ import annotations

import collections
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.data import hints, storage
from vit_jax.data.classes import FIELDS, Classes
from vit_jax.data.decode import BadImage
from vit_jax.data.left_out import LeftOut, in_a_line, printable
from vit_jax.data.limits import DEFAULT
from vit_jax.data.parquet_labels import described_labels, described_names, is_text, label_classes, parquet_file
from vit_jax.data.sources import split_options

log = logging.getLogger(__name__)

_MB = 1 << 20
_THREADS = 16
_OPTIONS = {"image": "", "label": "", "paths": "refuse", "window_mb": "256", "cache_mb": "512"}
_PATHS = ("refuse", "below")
_FIRST = 8  # rows that are looked at when a table is opened


class ParquetSource:
  """The rows of some Parquet files, in the order of the files' names.

  Attributes:
    blocks: int64 [groups + 1], the first record of each row group, and the number of records.
    window: row groups whose records are shuffled together.
  """

  def __init__(
    self,
    files: list[str],
    groups: np.ndarray,
    columns: tuple[str, str | None],
    classes: Classes,
    cache: int,
    window: int,
    paths: bool,
    left_out: LeftOut,
  ):
    """`groups`: int64 [groups, 4]: file, number in the file, rows, bytes. `cache`: bytes. `paths`: read them."""
    self._arguments = (files, groups, columns, classes, cache, window, paths, left_out)
    self._files, self._groups, self._columns, self._classes = files, groups, columns, classes
    self._cache_bytes, self._paths = cache, paths
    self._cache: collections.OrderedDict[int, _Group] = collections.OrderedDict()
    self._lock = threading.Lock()
    self.blocks = np.concatenate([[0], np.cumsum(groups[:, 2])]).astype(np.int64)
    self.window = window
    self.left_out = left_out
    self.class_names = classes.names
    self.num_classes = len(classes.names)
    self.remote = storage.is_remote(files[0])
    self.limits = DEFAULT

  def __reduce__(self):
    arguments = (*self._arguments[:5], self.window, *self._arguments[6:])
    return (ParquetSource, arguments, {"limits": self.limits})

  def __len__(self) -> int:
    return int(self.blocks[-1])

  def __getitem__(self, index: int) -> dict[str, bytes | int]:
    group, row = self._place(index)
    columns = self._group(group)
    column, label = self._columns
    try:
      image, path = columns[column][row].as_py(), None
      if isinstance(image, dict):
        image, path = image.get("bytes"), image.get("path")
      elif isinstance(image, str):
        image, path = None, image
    except ValueError as error:
      raise BadImage(self.describe(index), f"the column {column!r} cannot be read ({in_a_line(error)})") from error
    if image is None and path:
      image = self._named(path, index)
    if not isinstance(image, bytes):
      what = "is empty" if image is None else f"holds a {type(image).__name__}"
      raise BadImage(self.describe(index), f"the column {column!r} {what}")
    return {"image": image, "label": self._label(columns[label][row]) if label in columns else -1}

  def _label(self, value: Any) -> int:
    try:
      return self._classes.number(value.as_py())
    except ValueError:  # text that is none
      return -1

  def _named(self, path: Any, index: int) -> bytes:
    """The content of a file that a row names instead of holding an image."""
    name = printable(str(path))
    if not self._paths:
      raise BadImage(self.describe(index), f"names the file {name} and holds no image: add ?paths=below to read it")
    folder = self._files[int(self._groups[self._place(index)[0], 0])].rpartition("/")[0]
    try:
      return storage.read(storage.below(folder, str(path)), self.limits)
    except ValueError as error:
      raise BadImage(self.describe(index), f"names the file {name}, which {error}") from error

  def describe(self, index: int) -> str:
    group, row = self._place(index)
    file, number = self._groups[group, :2]
    return f"row {row} of row group {number} of {printable(self._files[file])}"

  def _place(self, index: int) -> tuple[int, int]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    group = int(np.searchsorted(self.blocks, index, side="right")) - 1
    return group, index - int(self.blocks[group])

  def _group(self, group: int) -> _Group:
    """A row group's columns, from those that are kept or else from the file."""
    with self._lock:  # threads that want the same row group must not each read it
      if group in self._cache:
        self._cache.move_to_end(group)
      else:
        new = self._read(group)
        kept = sum(table.nbytes for table in self._tables()) + new.nbytes
        while self._cache and kept > self._cache_bytes:
          kept -= self._cache.popitem(last=False)[1].nbytes
        self._cache[group] = new
      found = self._cache[group]
    if found.failure:
      raise BadImage(found.failure, "cannot be read; the file is damaged there")
    return found

  def _read(self, group: int) -> _Group:
    """Reads a row group; without its labels, if they are what is damaged."""
    file, number = self._groups[group, :2]
    image, label = self._columns
    for names in [[image, label], [image]] if label else [[image]]:
      try:
        table = parquet_file(self._files[file]).read_row_group(int(number), columns=names)
        return _Group({name: table.column(name).combine_chunks() for name in table.column_names}, table.nbytes)
      except OSError as error:
        if error.errno is not None:
          raise
        failure = error
      except Exception as error:  # Arrow and the codecs raise almost anything on damaged pages
        failure = error
    where = f"row group {number} of {self._files[file]} ({int(self._groups[group, 2])} rows)"
    log.warning("%s cannot be read: %s", printable(where), in_a_line(failure))
    return _Group({}, 0, printable(where))

  def _tables(self) -> list[_Group]:
    return list(self._cache.values())


class _Group(dict):
  """The columns of a row group by their names; `failure`: which row group it is, if it cannot be read."""

  def __init__(self, columns: dict[str, Any], nbytes: int, failure: str = ""):
    super().__init__(columns)
    self.nbytes, self.failure = nbytes, failure


def open_parquet(rest: str, spec: str) -> ParquetSource:
  """Opens `glob[?image=COLUMN&label=COLUMN&paths=below&window_mb=256&cache_mb=512]`.

  Without the options, the image is the column "image" or "img" or else the first one of images; the label the first
  column of `classes.FIELDS`, or else the first that the metadata of Hugging Face describe as one of class labels.
  `paths=below`: rows may name files below the table's folder instead of holding images, also as text in the column
  `image`. `window_mb`: how much is shuffled together; `cache_mb`: how much a process keeps in memory, at least one
  window.

  Raises:
    ValueError: if no file matches, one is no Parquet file, they differ in their columns, or have no image.
    ImportError: if pyarrow is not installed.
  """
  _pyarrow(spec)
  pattern, options = split_options(rest)
  if unknown := sorted(set(options) - set(_OPTIONS)):
    raise ValueError(f"data.source = {spec!r}: unknown option {', '.join(unknown)}; valid: {', '.join(_OPTIONS)}.")
  left_out = LeftOut()
  files = storage.matches(pattern, left_out)
  paths = options.get("paths", _OPTIONS["paths"])
  if paths not in _PATHS:
    raise ValueError(f"data.source = {spec!r}: paths={paths} must be one of {', '.join(_PATHS)}.")
  if not files:
    found = f"{storage.contents(pattern)}.{hints.no_match(pattern)}"
    raise ValueError(f"data.source = {spec!r}: no file matches {pattern}; {found}")

  footers = _footers(files, spec)
  schema, groups = footers[0][0], _row_groups(footers)
  image, label = _image_column(schema, options, spec), _label_column(schema, options, spec)
  for path, (other, metadata) in zip(files, footers, strict=True):
    if lacking := [name for name in (image, label) if name and name not in other.names]:
      raise ValueError(f"data.source = {spec!r}: {path} has no column {lacking[0]!r}, only {', '.join(other.names)}.")
    kind = other.field(image).type
    if metadata.num_rows and not (_holds_images(kind) or (paths == "below" and is_text(kind))):
      raise ValueError(f"data.source = {spec!r}: the column {image!r} of {path} is of the type {kind}, not of images.")
  if not len(groups):
    raise ValueError(f"data.source = {spec!r}: the {len(files)} matching files hold no row.")
  if paths == "refuse" and _only_names(files[0], image):
    folder = files[0].rpartition("/")[0]
    raise ValueError(
      f"data.source = {spec!r}: the first rows hold no images; the column {image!r} names files. Add ?paths=below to "
      f"read those below {folder}."
    )
  window, cache = (_megabytes(options, key, spec) for key in ("window_mb", "cache_mb"))
  rows = max(1, int(window * _MB / max(1, groups[:, 3].max())))
  names = _names_of_classes(files, [one for one, _ in footers], label, spec)
  classes = label_classes(files, label, names, left_out)
  return ParquetSource(
    files, groups, (image, label), classes, max(cache, window) * _MB, rows, paths == "below", left_out
  )


def _footers(files: list[str], spec: str) -> list[tuple[Any, Any]]:
  """(schema, metadata) of each file."""

  def footer(path: str) -> tuple[Any, Any]:
    try:
      opened = parquet_file(path)
    except Exception as error:  # Arrow raises almost anything on a damaged footer
      raise ValueError(f"data.source = {spec!r}: {path} is no whole Parquet file: {in_a_line(error)}") from error
    return opened.schema_arrow, opened.metadata

  with ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(footer, files))


def _row_groups(footers: list[tuple[Any, Any]]) -> np.ndarray:
  """int64 [groups, 4]: file, number in the file, rows, bytes of each row group that has rows."""
  found = [
    (i, number, metadata.row_group(number).num_rows, metadata.row_group(number).total_byte_size)
    for i, (_, metadata) in enumerate(footers)
    for number in range(metadata.num_row_groups)
    if metadata.row_group(number).num_rows > 0
  ]
  return np.array(found, np.int64).reshape(-1, 4)


def _megabytes(options: dict[str, str], key: str, spec: str) -> int:
  text = options.get(key, _OPTIONS[key])
  if not text.isdecimal() or int(text) < 1:
    raise ValueError(f"data.source = {spec!r}: {key}={text} must be a whole number of megabytes, at least 1.")
  return int(text)


def _image_column(schema: Any, options: dict[str, str], spec: str) -> str:
  found = [field.name for field in schema if _holds_images(field.type)]
  listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
  if "image" in options:
    texts = [field.name for field in schema if options.get("paths") == "below" and is_text(field.type)]
    if options["image"] not in found + texts:
      raise ValueError(f"data.source = {spec!r}: {options['image']!r} is no column of images; the columns: {listed}.")
    return options["image"]
  if not found:
    raise ValueError(f"data.source = {spec!r} has no column of bytes or of {{bytes, path}}; the columns: {listed}.")
  usual = next((name for name in ("image", "img") if name in found), None)
  if usual is None and len(found) > 1:
    log.warning("%s: of the columns %s, %s is taken; ?image=COLUMN chooses", spec, " and ".join(found), found[0])
  return usual or found[0]


def _holds_images(kind: Any) -> bool:
  """Whether a column of this type may hold encoded images."""
  import pyarrow.types as kinds

  if kinds.is_struct(kind):
    return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
  if kinds.is_dictionary(kind):
    kind = kind.value_type
  return any(of_kind(kind) for of_kind in (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view))


def _label_column(schema: Any, options: dict[str, str], spec: str) -> str | None:
  if "label" in options:
    if options["label"] not in schema.names:
      raise ValueError(
        f"data.source = {spec!r}: there is no column {options['label']!r}; the columns: {', '.join(schema.names)}."
      )
    return options["label"]
  return next((name for name in (*FIELDS, *described_labels(schema)) if name in schema.names), None)


def _names_of_classes(files: list[str], schemas: list[Any], label: str | None, spec: str) -> list[str]:
  """The class names of the file that describes most of them.

  Raises:
    ValueError: if two files give one number to classes of different names.
  """
  longest, described_in = [], ""
  for path, schema in zip(files, schemas, strict=True):
    names = described_names(schema, label) if label else []
    for number, (one, other) in enumerate(zip(longest, names, strict=False)):
      if one != other:
        raise ValueError(
          f"data.source = {spec!r}: class {number} is {one!r} in {described_in} and {other!r} in {path}; read them as "
          "a mixture, parquet:… + parquet:…, which knows classes by their names."
        )
    if len(names) > len(longest):
      longest, described_in = names, path
  return longest


def _only_names(path: str, image: str) -> bool:
  """Whether the first rows of a table name files and hold no images."""
  try:
    batch = next(parquet_file(path, ahead=False).iter_batches(batch_size=_FIRST, columns=[image]))
    values = batch.column(0).to_pylist()
  except Exception:  # damaged: met again, and named, where it is read
    return False
  named = [isinstance(value, dict) and value["bytes"] is None and bool(value.get("path")) for value in values]
  return bool(named) and all(named)


def _pyarrow(spec: str) -> None:
  try:
    import pyarrow.parquet  # noqa: F401
  except ImportError as error:
    raise ImportError(f'data.source = {spec!r} needs the package pyarrow: pip install "vit-jax[parquet]"') from error
