"""Tensors that are read, or made, when they are asked for: a file larger than memory, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Shape = tuple[int, ...]


class LazyTensor:
  """A tensor that says its shape and type, and has its values in a file or makes them: `np.asarray` gets them.

  What was read is not kept. A tensor of a file is a view of the file, so that of a slice of it only that is read.
  """

  __slots__ = ("dtype", "shape", "_read")

  def __init__(self, shape: Shape, dtype: np.dtype, read: Callable[[], np.ndarray]):
    for name, value in (("shape", tuple(shape)), ("dtype", np.dtype(dtype)), ("_read", read)):
      object.__setattr__(self, name, value)

  def __setattr__(self, name: str, value: Any) -> None:
    raise AttributeError(f"a LazyTensor does not change: {name}")  # and what is built from a file cannot make it

  def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
    return np.array(self._read(), dtype, copy=copy)

  @property
  def ndim(self) -> int:
    """The number of axes."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """The number of elements."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """The bytes of its values."""
    return self.size * self.dtype.itemsize

  def __repr__(self) -> str:
    return f"LazyTensor({list(self.shape)}, {self.dtype})"


def map_file(path: Any, dtype: np.dtype, offset: int, size: int) -> np.ndarray:
  """The `size` elements of a file from a byte on, as a view that reads what is used of it; cannot be written."""
  if not size:
    return np.empty(0, dtype)
  return np.memmap(path, dtype, mode="r", offset=offset, shape=(size,)).view(np.ndarray)
