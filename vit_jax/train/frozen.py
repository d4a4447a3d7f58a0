"""The frozen teacher of a run: which one exactly, and its parameters on the devices."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import checkpoints, methods
from vit_jax.config import ConfigError
from vit_jax.train.setup import Run, begun_with

log = logging.getLogger(__name__)


def pin(run: Run, workdir: Path) -> Run:
  """The run with its frozen teacher named by step and by fingerprint, as they are saved; others stay as they are.

  A run as teacher means its newest step when the distillation starts, and the same step ever after.

  Raises:
    ConfigError: if the teacher is not the one that distillation.fingerprint demands, or is not finite.
  """
  if run.config.distillation.teacher is None:
    return run
  config = run.config.copy_and_resolve_references()
  wanted = config.distillation
  wanted.teacher = _begun_with(workdir, wanted.teacher) or wanted.teacher
  teacher = methods.frozen_teacher(config)
  try:
    teacher.params()
  except ValueError as error:
    raise ConfigError(str(error)) from error
  if wanted.fingerprint not in (None, teacher.fingerprint):
    raise ConfigError(
      f"distillation.fingerprint={wanted.fingerprint!r}: that of {teacher.address} is {teacher.fingerprint!r}: name "
      "the right teacher, or leave the fingerprint out"
    )
  wanted.teacher, wanted.fingerprint = teacher.address, teacher.fingerprint
  return dataclasses.replace(run, config=config)


def _begun_with(workdir: Path, given: str) -> str | None:
  """The step with which the run in `workdir` began, if `given` is the run of that step without saying which."""
  config, _ = begun_with(workdir)
  begun = None if config is None else config.distillation.teacher
  if begun is None:
    return None
  old, new = (checkpoints.find(Path(address).expanduser().absolute()) for address in (begun, given))
  return begun if old and new and new.step is None and old._replace(step=None) == new else None


def params_on_devices(run: Run, abstract: Any) -> Any:
  """The frozen teacher's parameters as global arrays with the shapes, types and shardings of `abstract`.

  Raises:
    ConfigError: if the file holds other arrays.
  """
  teacher = methods.frozen_teacher(run.config)
  given, wanted = flatten_dict(teacher.params(), sep="/"), flatten_dict(abstract, sep="/")
  problems = [f"{name} is missing" for name in wanted if name not in given]
  problems += [f"{name} is unknown" for name in given if name not in wanted]
  problems += [
    f"{name} is {np.shape(given[name])} instead of {leaf.shape}"
    for name, leaf in wanted.items()
    if name in given and np.shape(given[name]) != leaf.shape
  ]
  if problems:
    raise ConfigError(f"distillation.teacher={teacher.address!r}: is not what its config says: {'; '.join(problems)}")
  arrays = {}
  for name, leaf in wanted.items():
    array = np.asarray(given[name], leaf.dtype)
    arrays[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, array.__getitem__)
  teacher.release()
  log.info("Frozen teacher: %s (fingerprint %s).", teacher.address, teacher.fingerprint)
  return unflatten_dict(arrays, sep="/")
