"""The devices that a computation is for: their kind, which decides how some are written, and their number."""

from __future__ import annotations

import math

import jax


def platform() -> str:
  """The platform of the mesh around this, which may be of described devices, or else this machine's: "cpu", "tpu"…"""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def devices_of(names: str | tuple[str, ...] | None) -> int:
  """Over how many devices these axes of the mesh divide something."""
  mesh = jax.sharding.get_abstract_mesh()
  names = (names,) if isinstance(names, str) else names or ()
  return math.prod(mesh.shape.get(name, 1) for name in names)
