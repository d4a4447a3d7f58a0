"""Arrays of numpy in pickles, made of what a pickle says of them: nothing of numpy's is called by it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vit_jax.weights.errors import WeightsError
from vit_jax.weights.lazy import LazyTensor
from vit_jax.weights.pickles import Foreign

_MAKERS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_BUFFERS = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")  # of protocol 5
_KINDS = "fiub"  # numbers; others are named, not read


def array_in(value: Any) -> LazyTensor | None:
  """The array of numbers that an object of a pickle is; None: it is none.

  Its sizes are those of its bytes, which the pickle holds.
  """
  if not isinstance(value, Foreign):
    return None
  if str(value) in _MAKERS and type(value.state) is tuple and len(value.state) == 5:
    _, shape, dtype, fortran, data = value.state
    return _array(shape, dtype, "F" if fortran is True else "C", data)
  if str(value) in _BUFFERS and len(value.arguments) == 4:
    data, dtype, shape, order = value.arguments
    return _array(shape, dtype, order, data)
  return None


def _array(shape: Any, dtype: Any, order: Any, data: Any) -> LazyTensor | None:
  kind, text = _kind(dtype), _latin(data)
  content = data if text is None else text  # of the text, a character is a byte
  if kind is None or order not in ("C", "F") or not isinstance(content, bytes | str) or type(shape) is not tuple:
    return None
  if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
    return None
  if len(content) != math.prod(shape) * kind.itemsize:
    return None

  def read() -> np.ndarray:
    try:
      raw = content.encode("latin-1") if isinstance(content, str) else content
    except UnicodeEncodeError as error:
      raise WeightsError("an array of numpy in it is damaged: its bytes are none.") from error
    return np.frombuffer(raw, kind).reshape(shape, order=order)

  return LazyTensor(shape, kind, read)


def _kind(dtype: Any) -> np.dtype | None:
  """The type that a pickle describes; None: one that is not read."""
  if not isinstance(dtype, Foreign) or str(dtype) != "numpy.dtype" or not dtype.arguments:
    return None
  code, state = dtype.arguments[0], dtype.state
  order = state[1] if type(state) is tuple and len(state) > 1 else "<"
  if type(code) is not str or code[:1] not in _KINDS or not code[1:].isdecimal() or len(code) > 3:
    return None
  if order not in ("<", ">", "|", "="):
    return None
  try:
    return np.dtype(("<" if order in "|=" else order) + code)
  except TypeError:
    return None


def _latin(data: Any) -> str | None:
  """The text that bytes are in protocol 2; None: they are not given so."""
  if not isinstance(data, Foreign) or str(data) != "_codecs.encode" or len(data.arguments) != 2:
    return None
  text, code = data.arguments
  return text if type(text) is str and code in ("latin1", "latin-1") else None
