"""The arrays of an embedded data set behind the interface of a source, made once and kept in a cache file."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)


class EmbeddedSource:
  """Images and labels of one split, held as arrays.

  Attributes:
    images: uint8 [N, H, W, 3]; read from the cache file as needed when there is one.
    labels: int32 [N].
    class_names: one name per label.
    spec: the specification with every option written out.
  """

  def __init__(self, records: np.ndarray, *, class_names: tuple[str, ...], spec: str, path: Path | None = None):
    self._records = records
    self._path = path
    self.images = records["image"]
    self.labels = np.array(records["label"])
    self.class_names = class_names
    self.spec = spec

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
    return {"image": np.array(self.images[index]), "label": int(self.labels[index])}

  def describe(self, index: int) -> str:
    """What record `index` is, for messages."""
    return f"{self.spec} image {index} ({self.class_names[self.labels[index]]})"

  def __reduce__(self):
    # A worker process maps the cache file again instead of receiving every pixel through a pipe.
    if self._path is None:
      return (_from_records, (np.array(self._records), self.class_names, self.spec))
    return (_from_file, (self._path, self.class_names, self.spec))


def _from_records(records: np.ndarray, class_names: tuple[str, ...], spec: str) -> EmbeddedSource:
  return EmbeddedSource(records, class_names=class_names, spec=spec)


def _from_file(path: Path, class_names: tuple[str, ...], spec: str) -> EmbeddedSource:
  return EmbeddedSource(np.load(path, mmap_mode="r"), class_names=class_names, spec=spec, path=path)


def pack(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Images [N, H, W, 3] and labels [N] as one record array, so that one file holds both."""
  records = np.empty(len(images), np.dtype([("image", np.uint8, images.shape[1:]), ("label", np.int32)]))
  records["image"], records["label"] = images, labels
  return records


def cached(path: Path, make: Callable[[], np.ndarray], *, class_names: tuple[str, ...], spec: str) -> EmbeddedSource:
  """The source whose records are in `path`; made by `make` and written there first if they are not, or not whole."""
  if path.exists():
    try:
      return _from_file(path, class_names, spec)
    except (ValueError, EOFError, OSError) as error:
      log.warning("cached %s in %s is unreadable (%s): making it again", spec, path, error)
  log.info("making %s (once: kept in %s)", spec, path)
  records = make()
  try:
    _write(path, records)
  except OSError as error:
    log.warning("cannot keep %s in %s (%s): it stays in memory and is made again next time; "
                "set data.cache_dir or VIT_JAX_CACHE to a folder that can be written", spec, path, error)  # fmt: skip
    return _from_records(records, class_names, spec)
  return _from_file(path, class_names, spec)


def _write(path: Path, records: np.ndarray) -> None:
  """Writes under a temporary name and renames: a reader sees all of it or nothing, whoever else is writing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, name = tempfile.mkstemp(prefix=path.stem + ".", suffix=".part", dir=path.parent)
  try:
    with os.fdopen(descriptor, "wb") as file:
      np.save(file, records)
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise
