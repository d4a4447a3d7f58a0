"""Training methods: how one turns (state, batch) into (state, metrics).

A method is a module with a few functions, and nothing else in the program asks which one runs:

    views(config) -> Views                        what crops and masks the data must make
    modules(config) -> NamedTuple                 the modules that a student is made of, by sub-module
    init(config, key) -> State                    a fresh state
    starts(config) -> tuple[Start, ...]           what a fresh state takes from other runs and from files
    make_step(config) -> (state, batch) -> (state, metrics)
    export(state) -> (model, params)              what a user of the trained model wants
"""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType
from typing import Any

from vit_jax.methods.settings import build_backbone
from vit_jax.methods.state import State

METHODS = ("dinov3",)


def get(name: str) -> ModuleType:
  """The method called `name`.

  Raises:
    ValueError: if there is none, naming the nearest.
  """
  if name not in METHODS:
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0) or list(METHODS)
    raise ValueError(f"method={name!r}: there is no such method; nearest: {near[0]!r}.")
  return importlib.import_module(f"vit_jax.methods.{name}")


def backbone(config: Any) -> Any:
  """The model that `config` trains and exports."""
  return build_backbone(config)


__all__ = ["METHODS", "State", "backbone", "get"]
