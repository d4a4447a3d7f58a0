"""An embedded data set as a source: an image is made when it is read, or all of them once and for all."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax.data.subsets import Subset

log = logging.getLogger(__name__)

# Gives any image of a split by its index, uint8 [H, W, 3], with its label.
Example = Callable[[int], tuple[np.ndarray, int]]
Indices = range | np.ndarray

_RECENT = 64  # images that are remembered: what reads one may ask for its label or its name, too


class EmbeddedSource:
  """Images and labels of one split. Until they are kept (`keep`), those that are read are made one by one.

  Attributes:
    class_names: one name per label.
    spec: the specification with every option written out.
  """

  def __init__(
    self,
    example: Example,
    indices: Indices,
    *,
    class_names: tuple[str, ...],
    spec: str,
    path: Path,
    records: np.ndarray | None = None,
  ):
    """`indices`: which images of the split; `path`: the file that keeps them; `records`: the images, where it has."""
    self._example, self._indices, self._path = example, indices, path
    self.class_names = class_names
    self.spec = spec
    self._records = records
    self._recent = functools.lru_cache(_RECENT)(self._make)

  @property
  def num_classes(self) -> int:
    return len(self.class_names)

  @property
  def images(self) -> np.ndarray:
    """All images, uint8 [N, H, W, 3]; read from the file as needed."""
    return self._kept()["image"]

  @property
  def labels(self) -> np.ndarray:
    """All labels, int32 [N]."""
    return np.array(self._kept()["label"])

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
    image, label = self._entry(index)
    return {"image": np.array(image), "label": label}

  def describe(self, index: int) -> str:
    """What record `index` is, for messages."""
    return f"{self.spec} image {self._indices[index]} ({self.class_names[self._entry(index)[1]]})"

  def keep(self) -> None:
    """Makes all images and keeps them in the file, or in memory where it cannot be written: for many readings."""
    self._kept()

  def take(self, indices: np.ndarray) -> EmbeddedSource | Subset:
    """Some of the images as a source; the others are not made for it."""
    if self._records is not None:
      return Subset(self, indices)
    chosen = np.asarray(self._indices)[indices]
    name = f"{self._path.stem}-{len(chosen)}of{len(self)}-{zlib.crc32(chosen.tobytes()):08x}{self._path.suffix}"
    path = self._path.with_name(name)
    known = dict(class_names=self.class_names, spec=self.spec, path=path, records=read_kept(path, self.spec))
    return EmbeddedSource(self._example, chosen, **known)

  def _entry(self, index: int) -> tuple[np.ndarray, int]:
    if self._records is None:
      return self._recent(range(len(self))[index])
    record = self._records[index]
    return record["image"], int(record["label"])

  def _make(self, index: int) -> tuple[np.ndarray, int]:
    return self._example(int(self._indices[index]))

  def _kept(self) -> np.ndarray:
    if self._records is None:
      log.info("making %d images of %s (once: kept in %s)", len(self), self.spec, self._path)
      made = _pack([self._make(index) for index in range(len(self))])
      try:
        _write(self._path, made)
      except OSError as error:
        log.warning("cannot keep %s in %s (%s): it stays in memory and is made again next time; "
                    "set data.cache_dir or VIT_JAX_CACHE to a folder that can be written",
                    self.spec, self._path, error)  # fmt: skip
        self._records = made
      else:
        self._records = read_kept(self._path, self.spec)
    return self._records

  def __reduce__(self):
    # A worker process maps the file again instead of receiving every pixel through a pipe.
    records = self._path if isinstance(self._records, np.memmap) else self._records
    return _rebuild, (self._example, self._indices, self.class_names, self.spec, self._path, records)


def _rebuild(example, indices, class_names, spec, path, records) -> EmbeddedSource:
  records = read_kept(path, spec) if isinstance(records, Path) else records
  return EmbeddedSource(example, indices, class_names=class_names, spec=spec, path=path, records=records)


def _pack(made: list[tuple[np.ndarray, int]]) -> np.ndarray:
  """Images and labels as one record array, so that one file holds both."""
  records = np.empty(len(made), np.dtype([("image", np.uint8, made[0][0].shape), ("label", np.int32)]))
  for index, (image, label) in enumerate(made):
    records["image"][index], records["label"][index] = image, label
  return records


def read_kept(path: Path, spec: str) -> np.ndarray | None:
  """The records that a file keeps; None where there is none, or not a whole one."""
  if not path.exists():
    return None
  try:
    return np.load(path, mmap_mode="r")
  except (ValueError, EOFError, OSError) as error:
    log.warning("cached %s in %s is unreadable (%s): making it again", spec, path, error)
    return None


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
