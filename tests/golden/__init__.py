"""Inputs and outputs of the public PyTorch implementation, and how tests read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent


class Golden(dict):
  """The arrays of one file by name, and the `settings` they were made with."""

  def __init__(self, name: str):
    with np.load(FOLDER / f"{name}.npz") as file:
      super().__init__({key: file[key] for key in file.files if key != "__settings__"})
      self.settings: dict[str, Any] = json.loads(str(file["__settings__"])) if "__settings__" in file.files else {}

  def under(self, prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start with `prefix/`, without it."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in self.items() if key.startswith(f"{prefix}/")}
