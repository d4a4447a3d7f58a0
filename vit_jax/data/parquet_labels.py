"""The classes of a column of Parquet tables, from all its labels; what of it cannot be read is counted and named."""

from __future__ import annotations

import collections
import itertools
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vit_jax.data import storage
from vit_jax.data.classes import Classes, NoClass, classes_of, names_in, text_of
from vit_jax.data.left_out import LeftOut

log = logging.getLogger(__name__)

_THREADS = 16


def parquet_file(path: str, *, ahead: bool = True) -> Any:
  """An opened Parquet file; `ahead`: what is read of it in an object store is asked for in few, large parts.

  What the footer says of the single columns is never asked for: pyarrow ends the process where that is damaged.
  """
  import pyarrow.parquet as pq

  if storage.is_remote(path):
    return pq.ParquetFile(storage.open_file(path), pre_buffer=ahead)
  return pq.ParquetFile(path, memory_map=False)


def is_text(kind: Any) -> bool:
  """Whether a column of this type holds text."""
  import pyarrow.types as kinds

  return any(of_kind(kind) for of_kind in (kinds.is_string, kinds.is_large_string, kinds.is_string_view))


def label_classes(files: list[str], label: str | None, names: list[str], left_out: LeftOut) -> Classes:
  """The classes of a column.

  Args:
    files: the tables.
    label: the column; None: there are no labels.
    names: of the classes, if the files describe them.
    left_out: where to count row groups whose labels cannot be read, and labels that can mean no class.
  """
  if label is None:
    return classes_of(())
  with ThreadPoolExecutor(_THREADS) as pool:
    found = list(pool.map(_file_labels, files, itertools.repeat(label)))
  for _, others in found:
    left_out.merge(others)
  return classes_of(set().union(*(labels for labels, _ in found)), names)


def described_labels(schema: Any) -> list[str]:
  """The columns that a table's metadata describe as class labels."""
  features = _described(schema)
  return [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"]


def described_names(schema: Any, label: str) -> list[str]:
  """The class names in a table's metadata; none: there are none, or what there is cannot be understood."""
  try:
    names = _described(schema)[label]["names"]
    return names_in(names) if names else []
  except (KeyError, TypeError):
    return []  # another description, or a column that is not described as one of classes
  except ValueError as error:
    _not_understood(error)
    return []


def _described(schema: Any) -> dict[str, Any]:
  """What a table's metadata say of its columns; nothing, if it is not understood."""
  text = (schema.metadata or {}).get(b"huggingface")
  if text is None:
    return {}
  try:
    features = json.loads(text)["info"]["features"]
    return features if isinstance(features, dict) else {}
  except (KeyError, TypeError):
    return {}
  except (ValueError, RecursionError) as error:
    _not_understood(error)
    return {}


def _not_understood(error: Exception) -> None:
  log.warning("the description by Hugging Face in a table's metadata is not understood: %s", error)


def _file_labels(path: str, label: str) -> tuple[set[str], LeftOut]:
  """(the labels in a file, as text; what cannot be read)."""
  found, left_out = set(), LeftOut()
  for number, values in _columns(path, label, left_out):
    for value, count in values.items():
      try:
        found.add(text_of(value))
      except NoClass as error:
        left_out.add(f"label that is {error}", f"row group {number} of {path}", count)
  return found - {None}, left_out


def _columns(path: str, label: str, left_out: LeftOut) -> Iterator[tuple[int, collections.Counter]]:
  """(number of a row group, its labels and how often each occurs)."""
  opened = parquet_file(path)
  for number in range(opened.metadata.num_row_groups):
    where = f"row group {number} of {path}"
    try:
      yield number, _counted(opened.read_row_group(number, columns=[label]).column(label), where, left_out)
    except OSError as error:
      if error.errno is not None:
        raise
      left_out.add("row group whose labels cannot be read", where)
    except Exception:  # Arrow and the codecs raise almost anything on damaged pages
      left_out.add("row group whose labels cannot be read", where)


def _counted(column: Any, where: str, left_out: LeftOut) -> collections.Counter:
  """How often each value of a column occurs."""
  import pyarrow as pa
  import pyarrow.types as kinds

  if kinds.is_nested(column.type):
    left_out.add(f"label that is of the type {column.type}", where, len(column))
    return collections.Counter()
  if kinds.is_dictionary(column.type):
    column = column.cast(column.type.value_type)
  if is_text(column.type):
    column = column.cast(pa.large_binary())  # text that is none is met label by label
  try:
    counts = column.value_counts()
    return collections.Counter(dict(zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True)))
  except pa.ArrowNotImplementedError:
    return collections.Counter(column.to_pylist())
