"""The labels of sources that keep them inside their records: looked for once, and then known from the cache."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vit_jax.data import storage
from vit_jax.data.classes import Classes, NoClass, classes_of, text_of
from vit_jax.data.decode import BadImage
from vit_jax.data.index import index_path, read_index, write_index
from vit_jax.data.left_out import LeftOut

log = logging.getLogger(__name__)

_FORM = 1  # of the index
_FEW = 2000  # records that are all looked at; of more, a sample says first whether it is worth it
_SAMPLE = 64
_THREADS = 8


def classes_of_records(
  read: Callable[[int], Any],
  count: int,
  files: Sequence[str],
  *,
  names: Sequence[str] = (),
  cache_dir: str | os.PathLike | None = None,
) -> tuple[Classes, LeftOut]:
  """(the classes of the labels in some records, what of them can mean no class).

  All records are read for it, once, if there are few, or if the labels of a sample are not those of `names`.

  Args:
    read: the label of a record; raises BadImage or OSError if it cannot be read, which is met again with its image.
    count: of records.
    files: that hold them.
    names: of classes 0, 1, …, if there is a list.
    cache_dir: where the labels are kept.
  """
  if count > _FEW:
    sample = np.linspace(0, count - 1, _SAMPLE).astype(np.int64).tolist()
    labels, _ = _labels(read, sample)
    if labels <= set(map(str, range(len(names)))):
      return classes_of((), names), LeftOut()
  versions = [list(storage.version(file)) for file in files]
  place = index_path("labels", "\n".join(files), cache_dir)
  if count > _FEW and place.exists():
    try:
      about = read_index(place)[0]
      if (about["form"], about["versions"]) == (_FORM, versions):
        return classes_of(about["labels"], names), LeftOut(about["left_out"])
    except (OSError, ValueError, KeyError) as error:
      log.warning("the index %s cannot be read (%s): making it again", place, error)
  if count > _FEW:
    log.info("reading the labels of %d records of %s (once: kept in %s)", count, files[0], place)
  labels, left_out = _labels(read, range(count))
  if count > _FEW:
    try:
      about = {"form": _FORM, "versions": versions, "labels": sorted(labels), "left_out": left_out.to_json()}
      write_index(place, about, {})
    except OSError as error:
      log.warning("cannot keep the labels in %s (%s): they are read at every start", place, error)
  return classes_of(labels, names), left_out


def _labels(read: Callable[[int], Any], records: Iterable[int]) -> tuple[set[str], LeftOut]:
  """(the labels of some records, as text; what can mean no class)."""
  found, left_out = set(), LeftOut()

  def look(record: int) -> str | NoClass | None:
    try:
      return text_of(read(record))
    except NoClass as error:
      return error
    except (BadImage, OSError):
      return None

  records = iter(records)
  with ThreadPoolExecutor(_THREADS) as pool:
    while some := list(itertools.islice(records, 1024)):
      for record, label in zip(some, pool.map(look, some), strict=True):
        if isinstance(label, NoClass):
          left_out.add(f"label that is {label}", f"record {record}")
        elif label is not None:
          found.add(label)
  return found, left_out
