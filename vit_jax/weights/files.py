"""Reading and writing safetensors files (one file, or the shards named by an index)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from vit_jax.weights.errors import WeightsError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_safetensors(path: pathlib.Path | str) -> dict[str, np.ndarray]:
  """All tensors of a safetensors file, or of a folder with `model.safetensors` or its sharded form.

  Raises:
    WeightsError: if a file is damaged; FileNotFoundError: if there is none.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    return _read(path)
  if (path / SINGLE).exists():
    return _read(path / SINGLE)
  if not (path / INDEX).exists():
    raise FileNotFoundError(f"{path} has neither {SINGLE} nor {INDEX}.")
  shards = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
  return {name: tensor for shard in shards for name, tensor in _read(path / shard).items()}


def write_safetensors(path: pathlib.Path | str, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes tensors in the form that `transformers` and `torch` read."""
  # safetensors writes the memory of a non-contiguous array as if it were contiguous: wrong values, no error.
  contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  safetensors.numpy.save_file(contiguous, str(path), metadata={"format": "pt"})


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  if not path.exists():
    raise FileNotFoundError(f"there is no file {path}.")
  try:
    return safetensors.numpy.load_file(str(path))
  except safetensors.SafetensorError as error:
    raise WeightsError(f"{path} is not a readable safetensors file: {error}.") from error
