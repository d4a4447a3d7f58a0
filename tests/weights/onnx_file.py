"""Reads the weights of an ONNX file: just enough of the protobuf wire format for initializers and node inputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Node(NamedTuple):
  name: str
  inputs: list[str]


def read_onnx(path: Path | str) -> tuple[dict[str, np.ndarray], list[Node]]:
  """The float32 initializers by name, and the nodes."""
  graph = next(value for field, value in _fields(memoryview(Path(path).read_bytes())) if field == 7)
  tensors, nodes = {}, []
  for field, value in _fields(graph):
    if field == 5:
      parts = list(_fields(value))
      kind = next(v for f, v in parts if f == 2)
      name = next(bytes(v).decode() for f, v in parts if f == 8)
      raw = next((v for f, v in parts if f == 9), None)
      if kind == 1 and raw is not None:
        tensors[name] = np.frombuffer(raw, "<f4").reshape(_dims(parts))
    elif field == 1:
      parts = list(_fields(value))
      name = next((bytes(v).decode() for f, v in parts if f == 3), "")
      nodes.append(Node(name, [bytes(v).decode() for f, v in parts if f == 1]))
  return tensors, nodes


def _dims(parts: list) -> list[int]:
  dims = []
  for field, value in parts:
    if field == 1:
      dims += [value] if isinstance(value, int) else _varints(value)
  return dims


def _varints(data: memoryview) -> list[int]:
  values, at = [], 0
  while at < len(data):
    value, at = _varint(data, at)
    values.append(value)
  return values


def _varint(data: memoryview, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 0x7F) << shift
    at, shift = at + 1, shift + 7
    if byte < 0x80:
      return value, at


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
  """(number, value) of every field of a message."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    kind = key & 7
    if kind == 0:
      value, at = _varint(data, at)
    else:
      size, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
      value, at = data[at : at + size], at + size
    yield key >> 3, value
