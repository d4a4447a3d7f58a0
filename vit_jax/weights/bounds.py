"""Sizes that files of others claim, checked against the bytes that there are before any memory is taken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from vit_jax.weights.errors import Unreadable, WeightsError, shown

# Of what a file does not hold itself: repeated elements (torch saves expanded tensors so), compressed zeros.
_FREE = 16 * 2**20  # bytes
_COMPRESSION = 4  # trained weights in a zip become smaller by a tenth
_ROOM = {"depth": 1000, "other": 1 << 16}  # of an architecture that is only wrong, so that its tensors are compared


def check_bytes(claimed: int, stored: int, what: str) -> None:
  """Raises Unreadable if that many bytes cannot come from so many in a file."""
  most = _FREE + _COMPRESSION * stored
  if claimed > most:
    raise Unreadable(
      f"{what} would take {_in_words(claimed)}, but the file has {_in_words(stored)}: it repeats or compresses what no "
      "weights are"
    )


def most_operations(stored: int) -> int:
  """How many opcodes the pickle of a file of that many bytes may have: a tensor takes about 40, an object of torch's
  distributed checkpoints 10; each costs up to 80 bytes."""
  return 500_000 + stored // 16


def check_attributes(module: type[nn.Module], attributes: Mapping[str, Any]) -> None:
  """Raises a WeightsError that names the attributes, out of a file, that have not the type that they should have."""
  problems = _wrong({field.name: str(field.type) for field in dataclasses.fields(module)}, attributes)
  for name in ("rope", "position_table"):
    value = attributes.get(name)
    if dataclasses.is_dataclass(value):
      types = {field.name: str(field.type) for field in dataclasses.fields(value)}
      inner = {field: getattr(value, field) for field in types}
      problems += [f"{name}.{problem}" for problem in _wrong(types, inner)]
  if problems:
    raise WeightsError("; ".join(problems) + ".")


def check_architecture(model: nn.Module, tensors: Mapping[str, Any]) -> None:
  """Raises a WeightsError if a model is larger than tensors can make it: before it is built.

  Every block has a tensor, and every size is that of an axis of one.
  """
  most = max(_ROOM["other"], max((math.prod(np.shape(tensor)) for tensor in tensors.values()), default=0))
  blocks = max(_ROOM["depth"], len(tensors))
  stages = len(getattr(model, "depths", ()))
  if stages > max(16, len(tensors)):
    raise WeightsError(f"depths of {stages} stages: cannot be, as the file has {len(tensors)} tensors.")
  for name, size in _sizes(model):
    limit = blocks if name in ("depth", "depths") else most
    if size > limit:
      kind = f"{len(tensors)} tensors" if limit == blocks else f"no tensor of more than {most} elements"
      raise WeightsError(f"{name}={shown(str(size))}: cannot be, as the file has {kind}.")


def _sizes(model: nn.Module) -> Iterable[tuple[str, int]]:
  for name in ("width", "depth", "num_heads", "mlp_hidden", "num_registers", "patch_size", "in_channels"):
    yield name, getattr(model, name, 0) or 0
  for name in ("depths", "widths"):
    yield from ((name, value) for value in getattr(model, name, ()))
  table = getattr(model, "position_table", None)
  if table is not None:
    yield "position_table.grid", math.prod(table.grid)


def _wrong(types: Mapping[str, str], attributes: Mapping[str, Any]) -> list[str]:
  return [
    f"{name}={shown(_text(value))}: must be {wanted}"
    for name, value in attributes.items()
    if (wanted := _wanted(name, types.get(name, ""), value)) is not None
  ]


def _wanted(name: str, declared: str, value: Any) -> str | None:
  """What a value of this attribute has to be; None: it is."""
  kinds = [kind.strip() for kind in declared.split("|")]
  if value is None and "None" in kinds:
    return None
  if "int" in kinds:
    least = 0 if name == "num_registers" else 1
    return None if type(value) is int and value >= least else f"a whole number from {least} on"
  if "float" in kinds:
    known = type(value) in (int, float) and abs(value) < 1e30
    return None if known else "a number"
  if "bool" in kinds:
    return None if type(value) is bool else "true or false"
  if "str" in kinds:
    return None if type(value) is str else "a text"
  if declared.startswith("tuple[int"):
    known = type(value) in (tuple, list) and len(value) > 0 and all(type(n) is int and n > 0 for n in value)
    return None if known else "whole numbers from 1 on"
  return None


def _text(value: Any) -> str:
  try:
    return repr(value)
  except Exception as error:  # an integer of too many digits, too deep a list
    return f"({type(error).__name__})"


def _in_words(size: int) -> str:
  for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
    if size >= factor:
      return f"{size / factor:.3g} {unit}" if size < 10**18 else f"{size / factor:.1e} {unit}"
  return f"{size} bytes"
