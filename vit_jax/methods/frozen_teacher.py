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
from vit_jax.config.students import config_at
from vit_jax.methods.dino.networks import Modules, modules
from vit_jax.methods.init_from import not_finite
from vit_jax.weights import WeightsError, from_state_dict, parameter_shapes
from vit_jax.weights.finite import nonfinite
from vit_jax.weights.hub_cache import locate
from vit_jax.weights.infer import infer_head
from vit_jax.weights.opening import HEADS, holds_weights, open_weights, split_address

_KEY = "distillation.teacher"


class FrozenTeacher:
  """A teacher on disk.

  Attributes:
    address: where it is: a step of a run, or a file.
    modules: backbone and heads.
    normalization: mean and standard deviation of the images it was trained with; None: the file does not say.
  """

  def __init__(
    self,
    address: str,
    net: Modules,
    read: Callable[[], dict[str, Any]],
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None,
  ):
    self.address, self.modules, self.normalization = address, net, normalization
    self._read, self._params = read, None

  def params(self) -> dict[str, Any]:
    """The parameters by sub-module, in host memory until `release`.

    Raises:
      ValueError: if some are NaN or infinite; names them.
    """
    if self._params is None:
      params = self._read()
      if bad := nonfinite(flatten_dict(params, sep="/")):
        raise ValueError(f"{_KEY}={self.address!r}: {not_finite(bad)}.")
      self._params = params
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
  try:
    path = locate(config.distillation.teacher)
  except WeightsError as error:
    raise ValueError(f"{_KEY}={config.distillation.teacher!r}: {error}") from error
  address = checkpoints.find(path)
  if address is not None:
    return _of_run(str(address.pinned()), config.model.dtype)
  if holds_weights(path):
    return _of_file(str(path), split_address(path)[0].stat().st_mtime_ns, config.model.dtype)
  raise ValueError(
    f"{_KEY}={config.distillation.teacher!r}: is neither a run (a folder with {checkpoints.FOLDER}/), nor one of its "
    "steps or students, nor a file."
  )


@functools.lru_cache(maxsize=2)
def _of_run(path: str, dtype: str) -> FrozenTeacher:
  address = checkpoints.find(path)
  try:
    saved = config_at(from_dict(checkpoints.read_meta(address.workdir, step=address.step)["config"]), address)
  except (ValueError, checkpoints.NotSaved, checkpoints.Damaged) as error:
    raise ValueError(f"{_KEY}={path!r}: {error}") from error
  with saved.unlocked():
    saved.model.dtype = dtype
  read = functools.partial(checkpoints.restore_params, address.workdir, path=address.place, step=address.step)
  return FrozenTeacher(path, modules(saved), read, (saved.augment.mean, saved.augment.std))


@functools.lru_cache(maxsize=2)
def _of_file(path: str, mtime: int, dtype: str) -> FrozenTeacher:
  try:
    opened = open_weights(Path(path))
    missing = [name for name in HEADS if name not in opened.tensors]
    if missing:
      raise WeightsError(
        f"it has no {' and no '.join(missing)}: a student is compared with its teacher by their prototypes, and "
        f"published backbones come without. Train heads for it first: a run with method=dinov3 and init_from={path} "
        "(and init.freeze_backbone_steps, which keeps the backbone as it is at first); that run is then the teacher."
      )
    found = {"backbone": opened.backbone.module(**opened.backbone.attributes)}
    found |= {name: infer_head(opened.tensors[name]) for name in HEADS}
    layouts = {name: "dinov3" for name in HEADS} | {"backbone": opened.backbone.layout}
    for name, module in found.items():
      parameter_shapes(opened.tensors[name], module, layouts[name])  # all that does not fit is said now
  except (ValueError, OSError) as error:
    raise ValueError(f"{_KEY}={path!r}: {error}") from error

  def read() -> dict[str, Any]:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # a file may be larger than one accelerator
      return {name: from_state_dict(opened.tensors[name], module, layouts[name]) for name, module in found.items()}

  net = Modules(**{name: module.clone(dtype=dtype) for name, module in found.items()})
  return FrozenTeacher(path, net, read, opened.normalization)
