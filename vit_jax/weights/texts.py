"""JSON that comes with weights: configurations, indices, records; of bounded size, and an error in words."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from vit_jax.weights.errors import WeightsError, reading, shown

_POINTER = b"version https://git-lfs.github.com"
_LONGEST = 64 * 2**20  # bytes: the index of a model of 100,000 tensors has 10 million


def read_json(path: pathlib.Path) -> Any:
  """The content of a JSON file.

  Raises:
    WeightsError: if it is none.
  """
  check_no_pointer(path)
  with reading(path):
    if path.stat().st_size > _LONGEST:
      raise WeightsError(f"{path} is too long to be read as JSON.")
    text = path.read_bytes()
  return parse_json(text, path)


def parse_json(text: str | bytes, what: Any) -> Any:
  """The values of a JSON text.

  Raises:
    WeightsError: if it is none; names `what` it is of.
  """
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:  # of its syntax, its characters, its digits; of its depth
    raise WeightsError(f"{what} is no JSON: {shown(str(error))}.") from error


def check_no_pointer(path: pathlib.Path) -> None:
  """Raises a WeightsError if a file is what Git LFS leaves in place of a large file that was not fetched."""
  with reading(path), path.open("rb") as file:
    if file.read(len(_POINTER)) == _POINTER:
      raise WeightsError(
        f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull` in its repository."
      )
