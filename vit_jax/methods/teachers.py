"""The frozen teacher of a distillation: its modules and where its parameters are.

A teacher never changes, so that checkpoints do not repeat it (the heads of the 7B model alone are 312 million
parameters): a run's config holds the address and a fingerprint of the parameters, and they are read again, and
compared, whenever the run starts or goes on.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax import checkpoints
from vit_jax.config.saving import from_dict
from vit_jax.config.students import student_config, student_names
from vit_jax.methods.dinov3 import Modules, modules
from vit_jax.weights.heads import NoHeads, read_training_export
from vit_jax.weights.pth import read_pth

_KEY = "distillation.teacher"


class FrozenTeacher:
  """A teacher on disk.

  Attributes:
    address: where it is: a step of a run, or a file.
    modules: backbone and heads.
    mean, std: the normalisation of images it was trained with; None: the file does not say.
  """

  def __init__(
    self,
    address: str,
    net: Modules,
    read: Callable[[], dict[str, Any]],
    *,
    params: dict[str, Any] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
  ):
    self.address, self.modules, self.mean, self.std = address, net, mean, std
    self._read, self._params = read, params

  def params(self) -> dict[str, Any]:
    """The parameters by sub-module, in host memory until `release`."""
    if self._params is None:
      self._params = self._read()
    return self._params

  def release(self) -> None:
    """Lets go of the parameters."""
    self._params = None

  @functools.cached_property
  def fingerprint(self) -> str:
    """Twenty hexadecimal digits that are the same exactly for the same parameters, whatever file holds them."""
    digest = hashlib.blake2b(digest_size=10)
    for name, leaf in sorted(flatten_dict(self.params(), sep="/").items()):
      array = np.ascontiguousarray(leaf)
      digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
      digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def frozen_teacher(config: Any) -> FrozenTeacher | None:
  """The frozen teacher of a config, computing in the type of `model.dtype`; None for a run without one.

  Raises:
    ValueError: naming the key, if there is no such teacher, or it has no heads.
  """
  if config.distillation.teacher is None:
    return None
  path = Path(config.distillation.teacher).expanduser()
  address = checkpoints.find(path)
  if address is not None:
    return _of_run(str(address.pinned()), config.model.dtype)
  if path.is_file():
    return _of_file(str(path), path.stat().st_mtime_ns, config.model.dtype)
  raise ValueError(
    f"{_KEY}={config.distillation.teacher!r}: is neither a run (a folder with {checkpoints.FOLDER}/), nor one of its "
    "steps or students, nor a .pth file."
  )


@functools.lru_cache(maxsize=2)
def _of_run(path: str, dtype: str) -> FrozenTeacher:
  address = checkpoints.find(path)
  try:
    saved = from_dict(checkpoints.read_meta(address.workdir, step=address.step)["config"])
  except (checkpoints.NotSaved, checkpoints.Damaged) as error:
    raise ValueError(f"{_KEY}={path!r}: {error}") from error
  names = student_names(saved)
  if address.student not in (names or (None,)):
    right = " or ".join(str(address._replace(student=name)) for name in names or (None,))
    raise ValueError(f"{_KEY}={path!r}: that run has {'several' if names else 'no'} students: give {right}.")
  if names:
    saved = student_config(saved, address.student)
  with saved.unlocked():
    saved.model.dtype = dtype
  where = ("teacher", address.student) if names else ("teacher",)
  read = functools.partial(checkpoints.restore_params, address.workdir, path=where, step=address.step)
  return FrozenTeacher(path, modules(saved), read, mean=saved.augment.mean, std=saved.augment.std)


@functools.lru_cache(maxsize=2)
def _of_file(path: str, mtime: int, dtype: str) -> FrozenTeacher:
  def read() -> tuple[dict[str, Any], dict[str, Any]]:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # a file may be larger than one accelerator
      return read_training_export(read_pth(path))

  try:
    found, params = read()
  except NoHeads as error:
    raise ValueError(
      f"{_KEY}={path!r}: {error}: a student is compared with its teacher by their prototypes, and published backbones "
      f"come without. Train heads for it first: a run with method=dinov3 and init_from={path} (and "
      "init.freeze_backbone_steps, which keeps the backbone as it is at first); that run is then the teacher."
    ) from error
  except ValueError as error:
    raise ValueError(f"{_KEY}={path!r}: {error}") from error
  net = Modules(**{name: module.clone(dtype=dtype) for name, module in found.items()})
  return FrozenTeacher(path, net, lambda: read()[1], params=params)
