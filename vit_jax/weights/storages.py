"""The tensors of torch's pickles: each is a view of a storage, the flat content that lies outside the pickle."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vit_jax.weights import bounds
from vit_jax.weights.errors import Unreadable
from vit_jax.weights.lazy import LazyTensor
from vit_jax.weights.pickles import Foreign, Name

STORAGES = {  # those that are written, too
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}
_MORE = {
  "ShortStorage": np.dtype(np.int16),
  "CharStorage": np.dtype(np.int8),
  "ComplexFloatStorage": np.dtype(np.complex64),
  "ComplexDoubleStorage": np.dtype(np.complex128),
  "UntypedStorage": np.dtype(np.uint8),
}
_DTYPES = {  # of tensors whose storage has no type
  "float64": np.dtype(np.float64), "double": np.dtype(np.float64),
  "float32": np.dtype(np.float32), "float": np.dtype(np.float32),
  "float16": np.dtype(np.float16), "half": np.dtype(np.float16),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
  "int64": np.dtype(np.int64), "int32": np.dtype(np.int32), "int16": np.dtype(np.int16), "int8": np.dtype(np.int8),
  "uint64": np.dtype(np.uint64), "uint32": np.dtype(np.uint32), "uint16": np.dtype(np.uint16),
  "uint8": np.dtype(np.uint8), "bool": np.dtype(np.bool_),
}  # fmt: skip
_MOST_AXES = 32


class Storage(NamedTuple):
  """The flat content of a storage; `read` gets it, checked."""

  read: Callable[[], np.ndarray]
  dtype: np.dtype
  size: int


def storage_type(name: Any) -> np.dtype | None:
  """The type of the elements of one of torch's storage classes; None: one that is not read."""
  if not isinstance(name, Name) or name.module not in ("torch", "torch.storage", "torch.cuda"):
    raise Unreadable("it refers to what is no storage")
  return (STORAGES | _MORE).get(name.name)


def dtype_of(value: Any) -> np.dtype | None:
  """The type that a pickle names, such as torch.float32; None: one that is not read."""
  return _DTYPES.get(value.name) if isinstance(value, Name) and value.module == "torch" else None


def builders(stored: int) -> Mapping[str, Callable[..., Any]]:
  """What makes tensors, and other plain things, of the arguments that torch's pickles give.

  Args:
    stored: the bytes of the file: no tensor may be much larger.
  """
  rebuild = functools.partial(_rebuild, stored)
  return {
    "torch._utils._rebuild_tensor": rebuild,
    "torch._utils._rebuild_tensor_v2": rebuild,
    "torch._utils._rebuild_tensor_v3": functools.partial(_rebuild_typed, stored),
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _call_first(rebuild),
    "torch.Size": _size,
    "builtins.set": _elements,
    "builtins.frozenset": _elements,
  }


def _rebuild(stored: int, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> LazyTensor | Foreign:
  if isinstance(storage, Foreign):
    return storage
  if not isinstance(storage, Storage):
    raise Unreadable("it holds a malformed tensor")
  return _view(stored, storage, offset, size, stride)


def _rebuild_typed(stored: int, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> LazyTensor | Foreign:
  """Of a storage of bytes; the type is the third argument of the rest."""
  dtype = dtype_of(rest[2]) if len(rest) > 2 else None
  if isinstance(storage, Foreign) or dtype is None:
    return Foreign(Name("torch", "Tensor"), ())
  if not isinstance(storage, Storage):
    raise Unreadable("it holds a malformed tensor")
  size_of_storage = storage.size * storage.dtype.itemsize // dtype.itemsize

  def read() -> np.ndarray:
    return storage.read().view(np.uint8)[: size_of_storage * dtype.itemsize].view(dtype)

  return _view(stored, Storage(read, dtype, size_of_storage), offset, size, stride)


def _view(stored: int, storage: Storage, offset: Any, size: Any, stride: Any) -> LazyTensor:
  numbers = (offset, *size, *stride) if type(size) is type(stride) is tuple else (None,)
  if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(size) != len(stride) or len(size) > _MOST_AXES:
    raise Unreadable("it holds a malformed tensor")
  elements = math.prod(size)
  if elements and offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) >= storage.size:
    raise Unreadable(f"it holds a tensor that reaches beyond its storage of {storage.size} elements")
  bounds.check_bytes(elements * storage.dtype.itemsize, stored, f"a tensor of shape {tuple(size)}")
  strides = tuple(s * storage.dtype.itemsize for s in stride)

  def read() -> np.ndarray:
    if not elements:
      return np.empty(size, storage.dtype)
    return np.lib.stride_tricks.as_strided(storage.read()[offset:], size, strides, writeable=False)

  return LazyTensor(size, storage.dtype, read)


def _first(tensor: Any, *_: Any) -> Any:
  if not isinstance(tensor, LazyTensor | Foreign):
    raise Unreadable("it holds a malformed parameter")
  return tensor


def _call_first(rebuild: Callable[..., Any]) -> Callable[..., Any]:
  """A tensor with attributes, or of a subclass: what it is made of is a function and its arguments."""

  def build(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    known = str(function) in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
    return rebuild(*arguments) if known and type(arguments) is tuple else Foreign(kind, ())

  return build


def _size(values: Any = ()) -> tuple[int, ...]:
  if type(values) not in (tuple, list) or not all(type(n) is int and 0 <= n < 2**63 for n in values):
    raise Unreadable("it holds a malformed torch.Size")
  return tuple(values)


def _elements(values: Any = ()) -> list[Any]:
  if type(values) not in (tuple, list):
    raise Unreadable("it holds a malformed set")
  return list(values)
