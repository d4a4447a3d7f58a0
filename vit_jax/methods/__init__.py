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

from vit_jax.config.students import each_student
from vit_jax.methods.base import State
from vit_jax.methods.frozen_teacher import FrozenTeacher, frozen_teacher
from vit_jax.methods.settings import build_backbone

METHODS = {  # by name: its module
  "dinov3": "vit_jax.methods.dino.dinov3",
  "distillation": "vit_jax.methods.dino.distillation",
}


def get(name: str) -> ModuleType:
  """The method called `name`.

  Raises:
    ValueError: if there is none, naming the nearest.
  """
  if name not in METHODS:
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0) or list(METHODS)
    raise ValueError(f"method={name!r}: there is no such method; nearest: {near[0]!r}.")
  return importlib.import_module(METHODS[name])


def backbone(config: Any) -> Any:
  """The model that `config` trains and exports; of several students, take the config of one first."""
  return build_backbone(config)


def exports(method: ModuleType, state: State, config: Any) -> dict[str, tuple[Any, Any]]:
  """(model, parameters) of every model that a run trains, by its name; a run that trains one model calls it ""."""
  return {name: method.export(state, name) if name else method.export(state) for name in each_student(config)}


__all__ = ["METHODS", "FrozenTeacher", "State", "backbone", "each_student", "exports", "frozen_teacher", "get"]
