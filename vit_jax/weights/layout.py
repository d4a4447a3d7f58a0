"""What a layout of published weights is: a table of rows, one per tensor of the file, and how each tensor is stored.

A row maps one tensor name to one parameter (or to one slice of it, or a chunk of the tensor to it). Stacked parameters
(under `blocks/` or `layers/`) have a leading layer axis; their rows have `{i}` in the name and stand for one tensor per
layer.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import numpy as np

Shape = tuple[int, ...]
STACKED = re.compile(r"(^|/)(blocks|layers)/")


@dataclasses.dataclass(frozen=True)
class Form:
  """How a parameter (of one layer) is stored in a file."""

  file_shape: Callable[[Shape], Shape]
  to_file: Callable[[np.ndarray], np.ndarray]
  from_file: Callable[[np.ndarray, Shape], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of the file.

  Attributes:
    path: the parameter, names joined by slashes.
    name: the tensor; `{i}` is the layer.
    form: how it is stored.
    part: (axis, index) if the tensor is this slice of the parameter; slices that no row names are zero.
    chunk: (index, count) if the parameter is this one of so many equal chunks of the tensor's first axis.
    copy: the tensor repeats what another row of the parameter holds; a file may leave it out.
  """

  path: str
  name: str
  form: Form
  part: tuple[int, int] | None = None
  chunk: tuple[int, int] | None = None
  copy: bool = False


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A tensor of the file that is not a parameter but follows from the model; compared within `rtol` on import."""

  name: str
  value: np.ndarray
  rtol: float = 0.0
  meaning: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
  """A family of files.

  Attributes:
    rows: its table for a model.
    modules: the classes of models that it can hold.
    buffers: what it stores besides parameters.
    outside: beginnings of the names of tensors that are no part of a backbone, such as a classifier; not loaded.
    hint: said where a model has what the layout cannot hold.
  """

  rows: Callable[[Any], tuple[Row, ...]]
  modules: tuple[type[nn.Module], ...]
  buffers: Callable[[Any], tuple[Buffer, ...]] = lambda model: ()
  outside: tuple[str, ...] = ()
  hint: str = ""


def _flat() -> Form:
  return Form(lambda s: (math.prod(s),), lambda a: a.reshape(-1), lambda a, s: a.reshape(s))


def token(ones: int) -> Form:
  """A vector or matrix with leading axes of length one in the file."""
  return Form(lambda s: (1,) * ones + s, lambda a: a.reshape((1,) * ones + a.shape), lambda a, s: a.reshape(s))


def linear(inputs: int = 1) -> Form:
  """A kernel whose first `inputs` axes are summed over; (out, in) in the file."""

  def file_shape(shape: Shape) -> Shape:
    return math.prod(shape[inputs:]), math.prod(shape[:inputs])

  return Form(file_shape, lambda a: a.reshape(math.prod(a.shape[:inputs]), -1).T, lambda a, shape: a.T.reshape(shape))


def _convolution() -> Form:
  return Form(
    lambda s: (s[3], s[2], s[0], s[1]), lambda a: a.transpose(3, 2, 0, 1), lambda a, s: a.transpose(2, 3, 1, 0)
  )


FLAT = _flat()  # biases and norms: one axis in the file
LINEAR = linear()
CONVOLUTION = _convolution()  # (out, in, height, width) in the file, [height, width, in, out] here


def norm(path: str, name: str) -> tuple[Row, ...]:
  """The rows of a LayerNorm or RMSNorm."""
  return Row(f"{path}/scale", f"{name}.weight", FLAT), Row(f"{path}/bias", f"{name}.bias", FLAT)


def dense(path: str, name: str, form: Form = LINEAR) -> tuple[Row, ...]:
  """The rows of a linear map or convolution with bias."""
  return Row(f"{path}/kernel", f"{name}.weight", form), Row(f"{path}/bias", f"{name}.bias", FLAT)


def separate_qkv(names: Iterable[str]) -> tuple[Row, ...]:
  """The rows of query, key and value maps that are three tensors in the file."""
  rows = []
  for index, name in enumerate(names):
    rows.append(Row("blocks/attn/qkv/kernel", f"{name}.weight", LINEAR, part=(1, index)))
    rows.append(Row("blocks/attn/qkv/bias", f"{name}.bias", FLAT, part=(0, index)))
  return tuple(rows)


def no_registers(name: str, model: Any) -> tuple[Buffer, ...]:
  """The register tokens of a model without any, which transformers stores as an empty tensor [1, 0, D]."""
  return () if model.num_registers else (Buffer(name, np.zeros((1, 0, model.width), np.float32)),)
